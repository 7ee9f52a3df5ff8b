"""`Shoal`: the shortest way from a net to a fleet."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from fleet_server.sdk.client import Client, Json
from fleet_server.sdk.display import table
from fleet_server.sdk.errors import LocalError
from fleet_server.sdk.local import LocalFleet, free_port
from fleet_server.sdk.model import Model
from fleet_server.sdk.progress import bars

ONLINE_S = 60.0
QUICK = {"SHOAL_TELEMETRY_INTERVAL_S": "2", "SHOAL_PROBATION_S": "2"}


class Shoal:
    """A fleet, from a notebook.

        shoal = Shoal("http://localhost:7470", token=…)
        model = shoal.compile(net, optimizer, criterion, example_inputs=x, train=loader, evaluate=loader)
        model.optimize(name="cifar-net", prune="adaptive")
        model.deploy(target="accelerator==cuda", fallback="cpu")
        outputs = model.predict(images)

    Args:
        url: of the server.
        token: of a person or a program.
        fleet: in which to act, where the token may act in several.
        ca_file: certificates (PEM) that an `https://` server is checked by; the system's when absent.

    Raises:
        ApiError: for a URL or a token that can be none.
    """

    def __init__(
        self, url: str, token: str | None = None, *, fleet: str | None = None, ca_file: Path | None = None
    ) -> None:
        self.url = url
        self.client = Client(url, token, fleet=fleet, ca_file=ca_file)
        self._local: LocalFleet | None = None

    @classmethod
    @contextlib.contextmanager
    def local(
        cls, folder: Path | str = ".shoal-local", *, agents: int = 1, progress: bool | None = None
    ) -> Iterator[Self]:
        """Start a server, its broker and agents on this machine, and end them with the block.

            with Shoal.local() as shoal:
                …

        Args:
            folder: for all they keep, logs too; a folder that is there goes on where it was.
            agents: how many devices, at most 50.
            progress: whether bars are shown; None: where somebody can see them.

        Raises:
            LocalError: when something does not start; the sentence names its log.
        """
        if not 0 < agents <= 50:
            raise LocalError(f"agents: {agents} can't be started: 1 to 50 can")
        processes = LocalFleet(Path(folder), port=free_port(), broker_port=free_port(), settings=QUICK)
        try:
            with bars(shown=progress) as shown:
                shown.tell("start the server")
                processes.start_server()
                token = processes.wait_for_token()
                shown.tell("start the server", 1.0)
                names = [f"agent-{number}" for number in range(1, agents + 1)]
                processes.start_agents([(name, f"127.0.0.1:{free_port()}") for name in names], token)
                found = cls(processes.url, token)
                found._local = processes
                with found:
                    for number in found._arriving(names):
                        shown.tell("start agents", number / agents)
                    yield found
        finally:
            processes.stop()

    def compile(
        self,
        net: Any,
        optimizer: Any = None,
        criterion: Any = None,
        *,
        example_inputs: Any,
        train: Any = None,
        evaluate: Any = None,
    ) -> Model:
        """Take a live net, with what trains and judges it. Nothing leaves this machine yet.

        Args:
            net: a torch.nn.Module.
            optimizer: of its parameters: recovery training makes one of the same class and settings for each net.
            criterion: a function of the first output and the targets that gives a scalar, for recovery training and
                `Model.score`; None: cross-entropy of classes, squares of numbers.
            example_inputs: a tensor, or a tuple of one for each parameter of `forward`; the first axis counts rows.
            train: batches `(inputs, targets)` such as a DataLoader, or `(inputs, targets)` whole; it is read now.
            evaluate: held-out rows, likewise: they decide how far passes go, and variants are measured on them.

        Raises:
            NetError: saying what does not fit.
        """
        from fleet_server.sdk.learning import LiveNet

        live = LiveNet(net, optimizer, criterion, example_inputs=example_inputs, train=train, evaluate=evaluate)
        return Model(self.client, live)

    def model(self, name: str, version: str | None = None) -> Model:
        """A model that is on the server; its newest version where none is named.

        Raises:
            NotFoundError: when there is none.
        """
        return Model.of_server(self.client, name, version)

    def devices(self, query: str | None = None) -> list[Json]:
        """Devices, as the API shows them; only those that a query in RSQL holds for."""
        return list(self.client.items("/devices", query=query))

    def close(self) -> None:
        """End its connections."""
        self.client.__exit__()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _arriving(self, names: list[str]) -> Iterator[int]:
        """How many agents are online, until all are."""
        assert self._local is not None
        deadline = time.monotonic() + ONLINE_S
        while True:
            here = sum(one["id"] in names for one in self.client.items("/devices", online=True))
            yield here
            if here == len(names):
                return
            ended = self._local.failed()
            if ended or time.monotonic() > deadline:
                said = f"{ended} ended by itself" if ended else f"{here} of {len(names)} agents came online"
                raise LocalError(f"{said}; the logs are in {self._local.logs}")
            time.sleep(0.2)

    def __repr__(self) -> str:
        return f"<Shoal at {self.url}>"

    def _repr_html_(self) -> str:
        found = self.devices()[:50]
        rows: list[dict[str, object]] = [
            {"device": one["id"], "online": one["online"], "profile": one["profile"]} for one in found
        ]
        return table("Shoal", {"server": self.url, "devices": len(found)}, rows)
