"""How a device gets its certificate: over HTTPS, from a server whose CA it knows by a pin, a file, or the system."""

from __future__ import annotations

import http.client
import json
import logging
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from agent.config import Config
from agent.errors import EnrolmentError, IdentityError
from agent.identity import (
    CURRENT,
    ENROLLING,
    Identity,
    drop_identity,
    identity_folder,
    load_identity,
    save_certificates,
    save_identity,
)
from agent.keys import fingerprint, new_key, pinned, signing_request

log = logging.getLogger(__name__)
TOKEN = re.compile(r"^shoal1\.([0-9a-f]{64})\.[A-Za-z0-9_-]{32}\Z")
ANSWER_BYTES = 1 << 20
TIMEOUT_S = 20.0
POLL_LEAST_S = 1.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        server: `https://host:port`.
        token: enrolment token; empty when somebody is to approve the device.
        ca_pin: SHA-256 of the CA's public key; the token's own when empty.
        ca_file: PEM file that the server is checked against instead; for a server whose certificate is not the CA's.
        new_key: begin with another key.
        wait_s: how long to wait for approval.
    """

    server: str
    token: str = ""
    ca_pin: str = ""
    ca_file: str = ""
    new_key: bool = False
    wait_s: float = 3600.0


class _Answer(msgspec.Struct, frozen=True):
    id: str
    device_id: str
    fleet: str
    state: str
    reason: str
    ca: str
    broker: str
    certificate: str | None = None
    not_before: str | None = None
    not_after: str | None = None
    trust_root: dict[str, Any] | None = None
    retry_after_s: float = 5.0


def enroll(config: Config, request: Request, say: Callable[[str], None]) -> Identity:
    """Get a certificate and keep it; the same key is used however often it is tried.

    Args:
        config: device id and state folder.
        request: where, and by what right.
        say: takes sentences for the user.

    Raises:
        EnrolmentError: when the server refuses, can't be reached, or nobody approves in time.
        IdentityError: when the server is not the one that is pinned, or the folder can't be written.
    """
    folder = identity_folder(config.state_dir)
    key = _key(folder, config, new=request.new_key)
    digest = fingerprint(key)
    save_identity(folder, Identity(config.device_id, key, digest), ENROLLING)
    say(f"device {config.device_id}, key {digest}")
    pin = _pin(request)
    server = _Server(request, pin)
    body = {"device_id": config.device_id, "csr": signing_request(key, config.device_id)}
    if request.token:
        body["token"] = request.token
    answer = server.call("POST", "/api/v1/enrolments", body)
    if answer.state == "pending":
        say(f"waiting for approval: {answer.reason}. On the server: shoal device approve {answer.id}")
    deadline = time.monotonic() + request.wait_s
    while answer.state == "pending":
        pause = max(POLL_LEAST_S, answer.retry_after_s)
        if time.monotonic() + pause > deadline:
            raise EnrolmentError("nobody has approved this device yet: run it again later, without --new-key")
        time.sleep(pause)
        answer = server.call("GET", f"/api/v1/enrolments/{answer.id}")
    if answer.state != "issued" or not answer.certificate:
        raise EnrolmentError(f"the server rejected this device: {answer.reason}")
    if answer.device_id != config.device_id or fingerprint(answer.certificate) != digest:
        raise EnrolmentError("the server answered with another device's certificate: nothing was kept")
    if pin:
        pinned(answer.ca, pin)
    identity = Identity(
        device_id=config.device_id,
        key=key,
        key_sha256=digest,
        certificate=answer.certificate,
        ca=answer.ca,
        broker=answer.broker,
        fleet=answer.fleet,
        not_before=_seconds(answer.not_before),
        not_after=_seconds(answer.not_after),
        server=request.server,
        trust_root=answer.trust_root,
    )
    save_identity(folder, identity)
    if config.key:
        save_certificates(folder, identity)
    drop_identity(folder, ENROLLING)
    say(f"enrolled in fleet {answer.fleet}; the agent will connect to {answer.broker}")
    return identity


def _key(folder: Path, config: Config, *, new: bool) -> str:
    """The key of an earlier try, of the present identity, or a new one."""
    if config.key:
        return new_key(config.key)
    if not new:
        for name in (ENROLLING, CURRENT):
            kept = load_identity(folder, name)
            if kept is not None and kept.device_id == config.device_id:
                return kept.key
    return new_key()


def _pin(request: Request) -> str:
    parts = TOKEN.match(request.token)
    if request.token and parts is None:
        raise EnrolmentError(
            "--token: it is no enrolment token (shoal1.…): copy it whole from shoal device token create"
        )
    if request.ca_pin and not re.fullmatch(r"[0-9a-f]{64}", request.ca_pin):
        raise EnrolmentError("--ca-pin: it is not 64 hexadecimal digits: shoal device ca shows it")
    return request.ca_pin or (parts[1] if parts else "")


class _Server:
    """Verified HTTPS. With a pin, the CA is first fetched without trust, and believed only if it is the pinned one.

    To this machine itself plain HTTP will do: nobody stands between.
    """

    def __init__(self, request: Request, pin: str) -> None:
        try:
            parts = urlsplit(request.server)
            scheme, host, port = parts.scheme, parts.hostname or "", parts.port
        except ValueError:
            scheme, host, port = "", "", None
        plain = host in LOOPBACK and scheme == "http"
        if not host or not (plain or scheme == "https"):
            raise EnrolmentError(
                f"--server: {request.server[:200]!r} is not https://host:port: tokens go over TLS only"
            )
        self._host, self._port = host, port or (80 if plain else 443)
        self._context: ssl.SSLContext | None = None
        if plain:
            return
        if request.ca_file or not pin:
            try:
                self._context = ssl.create_default_context(cafile=request.ca_file or None)
            except OSError as error:
                raise EnrolmentError(f"--ca-file: {request.ca_file!r} can't be used as PEM: {error}") from None
            return
        unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
        self._context = unverified
        bundle = str(self._json("GET", "/api/v1/ca").get("certificate", ""))
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # The pinned certificate alone is believed, and it may be below a root.
        self._context.load_verify_locations(cadata=pinned(bundle, pin))
        self._context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> _Answer:
        try:
            return msgspec.convert(self._json(method, path, body), _Answer)
        except msgspec.ValidationError as error:
            raise EnrolmentError(
                f"the server's answer can't be read ({error}): upgrade the agent or the server"
            ) from None

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        connection = (
            http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT_S)
            if self._context is None
            else http.client.HTTPSConnection(self._host, self._port, context=self._context, timeout=TIMEOUT_S)
        )
        try:
            content = json.dumps(body).encode() if body is not None else None
            connection.request(method, path, content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read(ANSWER_BYTES)
        except ssl.SSLCertVerificationError as error:
            detail = "the server's certificate can't be trusted"
            remedy = "enrol with a token, --ca-pin, or --ca-file; and check SHOAL_TLS_NAMES of the server"
            raise EnrolmentError(f"{detail} ({error.verify_message}): {remedy}") from None
        except (OSError, http.client.HTTPException) as error:
            raise EnrolmentError(
                f"no fleet server answers at {self._host}:{self._port} ({error}): see --server"
            ) from None
        finally:
            connection.close()
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise EnrolmentError(
                f"{self._host}:{self._port} answered {answer.status} without JSON: is it a fleet server?"
            )
        if answer.status >= 400:
            raise EnrolmentError(f"the server refused: {str(found.get('detail', answer.status))[:500]}")
        return found


def _seconds(moment: str | None) -> float:
    import datetime as dt

    try:
        return dt.datetime.fromisoformat(moment or "").timestamp()
    except ValueError:
        raise IdentityError("the server's answer holds no usable times: upgrade the agent or the server") from None
