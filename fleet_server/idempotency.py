"""`Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header-07): a POST that is sent twice acts once.

A key is claimed in a transaction of its own before the endpoint runs, so that whoever comes meanwhile, at any server
of the database, is told so. The answer is written in the transaction of the change itself, and only by who holds the
claim: a server that dies leaves a claim that runs out, and two that both believe in theirs can't both commit. Errors
are not kept: what was refused changed nothing, and may be tried again with the same key.

Answers may hold a secret that is shown once. So they are sealed with the client's key, of which the database knows
only a hash: who reads the database can't open them, as long as keys can't be guessed (our clients' are random UUIDs).
"""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import re
import zlib
from dataclasses import dataclass

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from fastapi import FastAPI, Request, Response
from sqlalchemy import delete, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fleet_server.clock import utc_now
from fleet_server.db import Database, new_id
from fleet_server.errors import InProgressError, InvalidError
from fleet_server.models import IdempotencyKey
from fleet_server.principals import Principal

HEADER = "Idempotency-Key"
REPLAYED = "Idempotency-Replayed"
CLAIM_S = 60.0  # after it, a server that has not answered is taken for dead
MOST_KEYS = 10_000  # of one principal in a fleet; the oldest are forgotten first
# Of any size, and never kept: an upload is known by its digest, so twice is once; an inference changes nothing.
STREAMED = frozenset({"upload", "infer_model"})
_KEY = re.compile(r'"([\x20-\x21\x23-\x5b\x5d-\x7e]{1,255})"|([\x21\x23-\x2b\x2d-\x7e]{1,255})')
_KEPT_HEADERS = ("content-type", "location", "etag")
_NONCE = 12


@dataclass(frozen=True)
class Claim:
    """The right to answer a key, for a while."""

    fleet_id: str
    principal_id: str
    key: bytes
    fingerprint: str
    id: str

    @property
    def key_sha256(self) -> str:
        """What the database knows of the key."""
        return hashlib.sha256(self.key).hexdigest()

    @property
    def row(self) -> tuple[str, str, str]:
        """Primary key of its row."""
        return self.fleet_id, self.principal_id, self.key_sha256


class ReplayedError(Exception):
    """Not an error: the answer is there already. Ends a request before its endpoint."""

    def __init__(self, answer: Response) -> None:
        super().__init__("replayed")
        self.answer = answer


async def claim_key(request: Request) -> None:
    """Dependency of every router below `/api/v1`, after the check of who asks.

    Raises:
        ReplayedError: when the request was answered before.
        InvalidError: for a key that is none, or that came with another request before.
        InProgressError: while the request is being answered.
    """
    given = request.headers.get(HEADER)
    principal: Principal | None = getattr(request.state, "principal", None)
    if given is None or request.method != "POST" or principal is None or request.scope["route"].name in STREAMED:
        return
    found = _KEY.fullmatch(given.strip())
    if found is None:
        detail = f"{HEADER}: give 1 to 255 printable characters, such as a random UUID, with or without quotes"
        raise InvalidError("bad_idempotency_key", detail, field=HEADER)
    said = [request.method, request.url.path, request.url.query]
    fingerprint = hashlib.sha256("\n".join(said).encode() + b"\n" + await request.body()).hexdigest()
    key = (found[1] or found[2]).encode()
    wanted = Claim(principal.fleet_id, principal.id, key, fingerprint, new_id())
    lifetime = dt.timedelta(hours=request.app.state.settings.idempotency_hours)
    answer = await run_in_threadpool(_claim, request.app.state.database, wanted, utc_now(), lifetime)
    if answer is not None:
        raise ReplayedError(answer)
    request.state.claim = wanted


async def keep_answer(request: Request, answer: Response) -> None:
    """Write the answer of a request that claimed its key, in the transaction of the change where there is one.

    Raises:
        InProgressError: when the claim ran out and another server took it over: then this change is not made.
    """
    claim: Claim | None = getattr(request.state, "claim", None)
    if claim is None or answer.status_code >= 400:
        return
    session: Session | None = getattr(request.state, "write_session", None)
    if session is not None:
        if not await run_in_threadpool(_keep, session, claim, answer):
            raise _in_progress()
        return

    def in_its_own(database: Database) -> None:
        """Such an operation finds by itself what it made before (a version): it is answered as it is."""
        with database.write() as own:
            _keep(own, claim, answer)

    await run_in_threadpool(in_its_own, request.app.state.database)


def _claim(database: Database, wanted: Claim, now: dt.datetime, lifetime: dt.timedelta) -> Response | None:
    with database.write() as session:
        row = session.get(IdempotencyKey, wanted.row, with_for_update=True)
        if row is not None and row.expires_at <= now:
            session.delete(row)
            session.flush()
            row = None
        until = now + dt.timedelta(seconds=CLAIM_S)
        if row is None:
            _insert(session, wanted, now, until, now + lifetime)
            return None
        if row.fingerprint != wanted.fingerprint:
            detail = f"{HEADER}: it came with another request before: take a new key for each request"
            raise InvalidError("idempotency_key_reused", detail, field=HEADER)
        if row.status is not None:
            return _opened(row, wanted)
        if row.claimed_until > now:
            raise _in_progress()
        row.claim, row.claimed_until = wanted.id, until
        return None


def _insert(session: Session, wanted: Claim, now: dt.datetime, until: dt.datetime, expires_at: dt.datetime) -> None:
    of_principal = (
        IdempotencyKey.fleet_id == wanted.fleet_id,
        IdempotencyKey.principal_id == wanted.principal_id,
    )
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.expires_at <= now))
    newest = select(IdempotencyKey.created_at).where(*of_principal).order_by(IdempotencyKey.created_at.desc())
    oldest_kept = session.scalar(newest.offset(MOST_KEYS - 1).limit(1))
    if oldest_kept is not None:
        session.execute(delete(IdempotencyKey).where(*of_principal, IdempotencyKey.created_at <= oldest_kept))
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    values = {
        "fleet_id": wanted.fleet_id,
        "principal_id": wanted.principal_id,
        "key_sha256": wanted.key_sha256,
        "fingerprint": wanted.fingerprint,
        "claim": wanted.id,
        "claimed_until": until,
        "created_at": now,
        "expires_at": expires_at,
    }
    made = insert(IdempotencyKey).values(values).on_conflict_do_nothing().returning(IdempotencyKey.claim)
    if session.execute(made).first() is None:
        raise _in_progress()


def _keep(session: Session, claim: Claim, answer: Response) -> bool:
    """Whether the claim still held."""
    held = (*_mine(claim), IdempotencyKey.status.is_(None))
    sealed = _sealed(claim, zlib.compress(bytes(answer.body)))
    headers = {name: value for name in _KEPT_HEADERS if (value := answer.headers.get(name)) is not None}
    written = update(IdempotencyKey).where(*held).values(status=answer.status_code, headers=headers, body=sealed)
    options = {"synchronize_session": False}
    return session.execute(written.returning(IdempotencyKey.claim), execution_options=options).first() is not None


def _release(database: Database, claim: Claim) -> None:
    with database.write() as session:
        session.execute(delete(IdempotencyKey).where(*_mine(claim), IdempotencyKey.status.is_(None)))


def _mine(claim: Claim):  # type: ignore[no-untyped-def]  # noqa: ANN202 (conditions)
    columns = (IdempotencyKey.fleet_id, IdempotencyKey.principal_id, IdempotencyKey.key_sha256)
    return (
        *(column == value for column, value in zip(columns, claim.row, strict=True)),
        IdempotencyKey.claim == claim.id,
    )


def _in_progress() -> InProgressError:
    return InProgressError(
        "request_in_progress", f"a request with this {HEADER} is being answered: send it again in a second", 1.0
    )


def _cipher(claim: Claim) -> ChaCha20Poly1305:
    derived = HKDF(SHA256(), 32, salt=None, info=b"shoal idempotency " + claim.fingerprint.encode())
    return ChaCha20Poly1305(derived.derive(claim.key))


def _sealed(claim: Claim, plain: bytes) -> bytes:
    nonce = os.urandom(_NONCE)
    return nonce + _cipher(claim).encrypt(nonce, plain, None)


def _opened(row: IdempotencyKey, claim: Claim) -> Response:
    sealed = row.body or b""
    body = zlib.decompress(_cipher(claim).decrypt(sealed[:_NONCE], sealed[_NONCE:], None))
    answer = Response(body, status_code=row.status or 200, headers=row.headers)
    answer.headers[REPLAYED] = "true"
    return answer


class _ReleasedKeys:
    """ASGI middleware: the key of a request that failed is free again before the client hears of it."""

    def __init__(self, app: ASGIApp, of: FastAPI) -> None:
        self._app = app
        self._of = of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})

        async def release() -> None:
            claim = state.pop("claim", None)
            if claim is not None:
                await run_in_threadpool(_release, self._of.state.database, claim)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                await release()
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            await release()
            raise


def add_idempotency(app: FastAPI) -> None:
    """Let the application give the answers again that it gave before, and free the keys of what failed."""

    def replay(_request: Request, found: Exception) -> Response:
        assert isinstance(found, ReplayedError)
        return found.answer

    app.add_exception_handler(ReplayedError, replay)
    app.add_middleware(_ReleasedKeys, of=app)
