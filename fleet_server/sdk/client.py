"""The client: REST calls as methods. Answers are the API's JSON objects."""

from __future__ import annotations

import json
import ssl
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import httpx

from fleet_server.sdk.errors import ApiError, ConflictError, UnreachableError, error_for
from fleet_server.sdk.event_stream import ServerEvent, read_events
from fleet_server.sdk.tracing import add_traceparent

Json = dict[str, Any]
BUILDING = frozenset({"queued", "building"})
ROLLING = frozenset({"awaiting_approval", "running", "reverting"})
PIECE = 1 << 20
RETRIES = 3
HEADER_LENGTH = "Inference-Header-Content-Length"
SILENT_S = 60.0  # of a stream, whose server says at least every 15 s that it is there
IN_PROGRESS_S = 90.0  # how long to wait for an answer to the same request; longer than a server's claim on it holds


def segment(name: str) -> str:
    """A name as one part of a path, whatever a person typed: it must not lead to another thing.

    Raises:
        NotFoundError: for a name that nothing can have.
    """
    if name in {"", ".", ".."} or "/" in name:
        raise error_for(404, {"code": "not_found", "detail": f"there is nothing called {name!r}: names have no slash"})
    return quote(name, safe="@")


class Client:
    """Talks to a fleet server.

    Args:
        url: such as `http://127.0.0.1:7470`.
        token: bearer token.
        fleet: in which fleet to act, where the token may act in several.
        timeout_s: of one request; uploads and new versions may take longer.
        ca_file: certificates (PEM) that an `https://` server is checked by; the system's when absent.

    Raises:
        ApiError: for a URL or a token that can be none.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout_s: float = 30.0,
        *,
        fleet: str | None = None,
        ca_file: Path | None = None,
    ) -> None:
        if token and not (token.isascii() and token.isprintable()):
            detail = "the token holds characters that no token has: see SHOAL_TOKEN"
            raise error_for(401, {"code": "not_authenticated", "detail": detail})
        if fleet and not (fleet.isascii() and fleet.isprintable()):
            raise error_for(
                403, {"code": "fleet_not_yours", "detail": f"no fleet is called {fleet!r}: see SHOAL_FLEET"}
            )
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        headers |= {"X-Shoal-Fleet": fleet} if fleet else {}
        self._url = url.rstrip("/")
        try:
            usable = httpx.URL(self._url).scheme in {"http", "https"} and httpx.URL(self._url).host
        except httpx.InvalidURL:
            usable = False
        if not usable:
            detail = f"{url!r} is not an address such as http://127.0.0.1:7470: see SHOAL_URL"
            raise UnreachableError(0, {"code": "bad_url", "detail": detail})
        try:
            verify: ssl.SSLContext | bool = ssl.create_default_context(cafile=ca_file) if ca_file else True
        except OSError as error:
            detail = f"{ca_file} can't be used as certificates in PEM ({error}): see SHOAL_CA_FILE"
            raise UnreachableError(0, {"code": "bad_ca_file", "detail": detail}) from None
        self._http = httpx.Client(
            base_url=f"{self._url}/api/v1",
            headers=headers,
            timeout=timeout_s,
            verify=verify,
            event_hooks={"request": [add_traceparent]},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str, **parameters: Any) -> Json:
        """One object; tried again when the connection fails."""
        found: Json = self._again("GET", path, params=_given(parameters)).json()
        return found

    def get_tagged(self, path: str, **parameters: Any) -> tuple[Json, str]:
        """One object and its ETag, for the `if_match` of a change."""
        answer = self._again("GET", path, params=_given(parameters))
        return answer.json(), answer.headers["ETag"]

    def read(self, path: str) -> bytes:
        """A file, as its bytes are."""
        found: bytes = self._request("GET", path).content
        return found

    def download(self, path: str, take: Callable[[bytes], object]) -> None:
        """A file of any size, piece by piece."""
        try:
            with self._http.stream("GET", path, timeout=3600) as answer:
                if answer.is_success:
                    for piece in answer.iter_bytes(PIECE):
                        take(piece)
                    return
                answer.read()
        except httpx.TransportError as error:
            detail = f"{self._url} broke off: {error}"
            raise UnreachableError(0, {"code": "unreachable", "detail": detail}) from None
        raise _problem(answer)

    def follow(self, path: str) -> Iterator[tuple[str, Json]]:
        """The events of a stream, each with its type and its data, up to the one of the type `end`.

        Where it is cut off it goes on after the last event that came; `UnreachableError` when nobody answers any more.
        """
        last, failures = "", 0
        while True:
            try:
                for event in self._stream(path, last):
                    last, failures = event.id or last, 0
                    yield event.kind, json.loads(event.data)
                    if event.kind == "end":
                        return
            except UnreachableError:
                failures += 1
                if failures > RETRIES:
                    raise
            time.sleep(0.5 * 2**failures)

    def _stream(self, path: str, last: str) -> Iterator[ServerEvent]:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last} if last else {})
        try:
            with self._http.stream("GET", path, headers=headers, timeout=SILENT_S) as answer:
                if answer.is_success:
                    yield from read_events(answer.iter_lines())
                    return
                answer.read()
        except httpx.TransportError as error:
            detail = f"{self._url} broke off: {error}"
            raise UnreachableError(0, {"code": "unreachable", "detail": detail}) from None
        raise _problem(answer)

    def items(self, path: str, **parameters: Any) -> Iterator[Json]:
        """Every row of a list, page by page."""
        cursor = None
        while True:
            page = self.get(path, cursor=cursor, limit=200, **parameters)
            yield from page["items"]
            cursor = page["next_cursor"]
            if cursor is None:
                return

    def post(
        self,
        path: str,
        body: Any = None,
        *,
        timeout_s: float | None = None,
        if_match: str | None = None,
        key: str | None = None,
    ) -> Any:
        """Create something, or act on it; tried again when the connection fails: with its key it is done once.

        Args:
            path: below `/api/v1`.
            body: as JSON.
            timeout_s: of one try.
            if_match: an ETag of `get_tagged`: do it only where the thing still is as it was then.
            key: the Idempotency-Key; a random one of its own when absent.

        Raises:
            ChangedError: when it is not as `if_match` says.
        """
        options: dict[str, Any] = {"timeout": timeout_s} if timeout_s else {}
        headers = {"Idempotency-Key": f'"{key or uuid.uuid4()}"'} | _condition(if_match)
        waited = time.monotonic() + IN_PROGRESS_S
        while True:
            try:
                return _content(self._again("POST", path, json=body, headers=headers, **options))
            except ConflictError as error:
                if error.code != "request_in_progress" or time.monotonic() > waited:
                    raise
                time.sleep(1.0)

    def put(self, path: str, body: Any, *, if_match: str | None = None) -> Json:
        """Say what something is to be; with `if_match` only where it still is what that ETag stands for."""
        found: Json = self._call("PUT", path, json=body, headers=_condition(if_match))
        return found

    def patch(self, path: str, body: Any, *, if_match: str | None = None) -> Json:
        """Change something; with `if_match` only where it still is what that ETag stands for."""
        changed: Json = self._call("PATCH", path, json=body, headers=_condition(if_match))
        return changed

    def delete(self, path: str, *, if_match: str | None = None) -> None:
        """Remove something; with `if_match` only where it still is what that ETag stands for."""
        self._call("DELETE", path, headers=_condition(if_match))

    def upload(self, path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> str:
        """Upload a file as a stream; returns its digest."""

        def pieces() -> Iterator[bytes]:
            with path.open("rb") as file:
                while piece := file.read(PIECE):
                    yield piece
                    on_bytes(len(piece))

        headers = {"Content-Length": str(path.stat().st_size)}
        digest: str = self._call("POST", "/uploads", content=pieces(), headers=headers, timeout=3600)["digest"]
        return digest

    def wait_for_variants(self, ids: list[str], *, poll_s: float = 0.5) -> Iterator[list[Json]]:
        """The variants, again and again, until none is being built."""
        while True:
            variants = [self.get(f"/variants/{segment(one)}") for one in ids]
            yield variants
            if all(variant["state"] not in BUILDING for variant in variants):
                return
            time.sleep(poll_s)

    def watch_gate_run(self, run_id: str, *, poll_s: float = 0.3) -> Iterator[Json]:
        """The gate run, again and again, until it is over."""
        while True:
            run = self.get(f"/gate-runs/{segment(run_id)}")
            yield run
            if run["state"] != "running":
                return
            time.sleep(poll_s)

    def watch_rollout(self, rollout_id: str, *, poll_s: float = 0.5) -> Iterator[Json]:
        """The rollout, again and again, until it stands still."""
        while True:
            rollout = self.get(f"/rollouts/{segment(rollout_id)}")
            yield rollout
            if rollout["state"] not in ROLLING:
                return
            time.sleep(poll_s)

    def infer(
        self,
        model: str,
        body: bytes,
        header_length: int,
        *,
        target: str | None = None,
        version: str | None = None,
        timeout_s: float = 60.0,
    ) -> tuple[bytes, int]:
        """Ask devices that serve a model: a request of the Open Inference Protocol v2, answered in the same form.

        Args:
            model: its name.
            body: at most 64 MiB; `fleet_server.sdk.tensors` makes it of arrays, and arrays of the answer.
            header_length: of the body's JSON, which binary tensors follow.
            target: only devices that this query holds for.
            version: only this version.
            timeout_s: how long the devices may take.

        Returns:
            The answer's body, and the length of its JSON.
        """
        answer = self._request(
            "POST",
            f"/models/{segment(model)}/infer",
            content=body,
            headers={"Content-Type": "application/octet-stream", HEADER_LENGTH: str(header_length)},
            params=_given({"target": target, "version": version, "timeout_s": timeout_s}),
            timeout=timeout_s + 30,
        )
        return answer.content, int(answer.headers[HEADER_LENGTH])

    def _again(self, method: str, path: str, **options: Any) -> httpx.Response:
        """A request that may be sent twice: tried again, later and later, when the connection fails."""
        for attempt in range(RETRIES - 1):
            try:
                return self._request(method, path, **options)
            except UnreachableError:
                time.sleep(0.5 * 2**attempt)
        return self._request(method, path, **options)

    def _call(self, method: str, path: str, **options: Any) -> Any:
        return _content(self._request(method, path, **options))

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            remedy = "set SHOAL_CA_FILE" if "CERTIFICATE_VERIFY_FAILED" in str(error) else "start it, or set SHOAL_URL"
            detail = f"no fleet server answers at {self._url} ({error}): {remedy}"
            raise UnreachableError(0, {"code": "unreachable", "detail": detail}) from None
        if answer.is_success:
            return answer
        raise _problem(answer)


def _given(parameters: Json) -> Json:
    return {key: value for key, value in parameters.items() if value is not None}


def _condition(if_match: str | None) -> dict[str, str]:
    return {"If-Match": if_match} if if_match else {}


def _content(answer: httpx.Response) -> Any:
    return answer.json() if answer.content else None


def _problem(answer: httpx.Response) -> ApiError:
    try:
        problem = answer.json()
    except ValueError:
        problem = {"detail": f"the server answered {answer.status_code}: {answer.text[:200]}"}
    return error_for(answer.status_code, problem)
