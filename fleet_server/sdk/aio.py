"""The same for asyncio: what waits for the network, or trains, runs in a thread meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

from fleet_server.sdk.client import Json
from fleet_server.sdk.deployment import Deployment
from fleet_server.sdk.model import Model
from fleet_server.sdk.shoal import Shoal


class AsyncShoal:
    """`Shoal` for asyncio; takes what that takes."""

    def __init__(self, url: str, token: str | None = None, **options: Any) -> None:
        self._shoal = Shoal(url, token, **options)

    @classmethod
    @contextlib.asynccontextmanager
    async def local(cls, folder: Path | str = ".shoal-local", **options: Any) -> AsyncIterator[Self]:
        """See `Shoal.local`."""
        found = cls.__new__(cls)
        # Children end with the thread that started them: it is this one, which waits a few seconds.
        with Shoal.local(folder, **options) as found._shoal:  # noqa: SLF001 (its own)
            yield found

    async def compile(self, net: Any, optimizer: Any = None, criterion: Any = None, **rows: Any) -> AsyncModel:
        """See `Shoal.compile`."""
        return AsyncModel(await asyncio.to_thread(self._shoal.compile, net, optimizer, criterion, **rows))

    async def model(self, name: str, version: str | None = None) -> AsyncModel:
        """See `Shoal.model`."""
        return AsyncModel(await asyncio.to_thread(self._shoal.model, name, version))

    async def devices(self, query: str | None = None) -> list[Json]:
        """See `Shoal.devices`."""
        return await asyncio.to_thread(self._shoal.devices, query)

    async def close(self) -> None:
        """End its connections."""
        await asyncio.to_thread(self._shoal.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<AsyncShoal at {self._shoal.url}>"

    def _repr_html_(self) -> str:
        return self._shoal._repr_html_()


class AsyncModel:
    """`Model` for asyncio.

    Attributes:
        model: its twin, with all that is known without asking.
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    async def score(self) -> dict[str, float]:
        """See `Model.score`."""
        return await asyncio.to_thread(self.model.score)

    async def optimize(self, **options: Any) -> Self:
        """See `Model.optimize`."""
        await asyncio.to_thread(self.model.optimize, **options)
        return self

    async def deploy(self, target: str | None = None, **options: Any) -> AsyncDeployment:
        """See `Model.deploy`."""
        return AsyncDeployment(await asyncio.to_thread(self.model.deploy, target, **options))

    async def predict(self, inputs: Any, **options: Any) -> Any:
        """See `Model.predict`."""
        return await asyncio.to_thread(self.model.predict, inputs, **options)

    def __repr__(self) -> str:
        return f"<Async{repr(self.model)[1:]}"

    def _repr_html_(self) -> str:
        return self.model._repr_html_()


class AsyncDeployment:
    """`Deployment` for asyncio.

    Attributes:
        deployment: its twin.
    """

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment

    async def status(self) -> str:
        """See `Deployment.status`."""
        return await asyncio.to_thread(lambda: self.deployment.status)

    async def wait(self) -> Self:
        """See `Deployment.wait`."""
        await asyncio.to_thread(self.deployment.wait)
        return self

    async def revert(self) -> Self:
        """See `Deployment.revert`."""
        await asyncio.to_thread(self.deployment.revert)
        return self

    def __repr__(self) -> str:
        return f"<Async{repr(self.deployment)[1:]}"

    def _repr_html_(self) -> str:
        return self.deployment._repr_html_()
