"""The REST API, asked in this process by the pages: what a page shows, a program can have too, and nothing else.

Pages have no other way to data, so rights, checks and audit are the API's.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Annotated, Any, NoReturn
from urllib.parse import quote

import httpx
from fastapi import Depends, Request

Json = dict[str, Any]
ASK_S = 60.0
CARRIED = ("authorization", "x-shoal-fleet", "user-agent")
MOST_ITEMS = 500


class RefusalError(Exception):
    """The API refused.

    Attributes:
        status: of HTTP.
        problem: the problem document (RFC 9457).
    """

    def __init__(self, status: int, problem: Json) -> None:
        self.status = status
        self.problem = problem
        super().__init__(str(problem.get("detail", f"the server answered {status}")))


class Api:
    """For one request of a page: as the person who sent it, in the fleet that they chose."""

    def __init__(self, request: Request) -> None:
        peer = (request.client.host, request.client.port) if request.client else ("127.0.0.1", 0)
        headers = {name: request.headers[name] for name in CARRIED if name in request.headers}
        self._http = httpx.AsyncClient(
            transport=httpx.ASGITransport(request.app, raise_app_exceptions=False, client=peer),
            base_url=f"{request.url.scheme}://{request.url.netloc or 'localhost'}/api/v1",
            headers=headers,
            timeout=ASK_S,
        )

    async def get(self, path: str, **parameters: Any) -> Json:
        """What is there.

        Args:
            path: below `/api/v1`; names in it are quoted by `segment`.
            parameters: of the query; those that are None or empty are left out.

        Raises:
            RefusalError: when it refuses.
        """
        given = {name: value for name, value in parameters.items() if value not in (None, "")}
        found: Json = _checked(await self._http.get(path, params=given)).json()
        return found

    async def all(self, *paths: str) -> list[Json]:
        """Several at once.

        Raises:
            RefusalError: when it refuses one of them.
        """
        return list(await asyncio.gather(*(self.get(path) for path in paths)))

    async def or_nothing(self, path: str, **parameters: Any) -> Json | None:
        """What is there; None where it is not, or is not for this person."""
        try:
            return await self.get(path, **parameters)
        except RefusalError as error:
            if error.status in {403, 404}:
                return None
            raise

    async def items(self, path: str, most: int = MOST_ITEMS, **parameters: Any) -> list[Json]:
        """The rows of a list, at most so many.

        Raises:
            RefusalError: when it refuses.
        """
        rows: list[Json] = []
        cursor = None
        while len(rows) < most:
            page = await self.get(path, cursor=cursor, limit=min(MOST_ITEMS, most - len(rows)), **parameters)
            rows += page["items"]
            cursor = page["next_cursor"]
            if cursor is None:
                break
        return rows

    async def tagged(self, path: str) -> tuple[Json, str]:
        """What is there, and the ETag by which a form changes just that and nothing newer.

        Raises:
            RefusalError: when it refuses.
        """
        answer = _checked(await self._http.get(path))
        return answer.json(), answer.headers.get("etag", "")

    async def send(self, method: str, path: str, body: Any = None, *, tag: str = "") -> Any:
        """Change something.

        Args:
            method: of HTTP.
            path: below `/api/v1`.
            body: as JSON.
            tag: only while what is there is what this ETag stands for; whatever is there when empty.

        Raises:
            RefusalError: when it refuses.
        """
        headers = {"If-Match": tag} if tag else None
        answer = _checked(await self._http.request(method, path, json=body, headers=headers))
        return answer.json() if answer.content else None

    async def fingerprint(self, path: str) -> bytes:
        """What stands for all that is there; ETags leave out what is only observed."""
        answer = await self._http.get(path)
        return hashlib.sha256(answer.content).digest()


def segment(name: object) -> str:
    """A name as one part of a path."""
    return quote(str(name), safe="@")


def refuse(detail: str, status: int = 422) -> NoReturn:
    """A page itself can't do what is asked for.

    Raises:
        RefusalError: saying so, as the API would.
    """
    raise RefusalError(status, {"detail": detail})


def refuse_field(field: str, detail: str) -> NoReturn:
    """What was typed into a field can't be sent at all.

    Raises:
        RefusalError: saying so, as the API would.
    """
    raise RefusalError(422, {"detail": f"{field}: {detail}", "problems": [{"field": field, "detail": detail}]})


def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.is_success:
        return answer
    try:
        problem = answer.json()
    except ValueError:
        problem = {}
    found = problem if isinstance(problem, dict) else {}
    raise RefusalError(answer.status_code, {"detail": f"the server answered {answer.status_code}"} | found)


PageApi = Annotated[Api, Depends(Api)]
