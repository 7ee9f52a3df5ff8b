"""A device as a source for its peers: mutual TLS within a fleet, ranges, and clients that only want to hold it up."""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import hashlib
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.config import Config
from agent.errors import AgentError, ConfigError
from agent.identity import Identity, identity_folder, save_identity
from agent.keys import fingerprint, new_key, signing_request
from agent.peers import server as peers
from agent.peers.mdns import usable_place
from agent.peers.network import Lan
from agent.peers.request import BadRequestError, parse
from agent.peers.server import PeerServer
from agent.protocol.manifest import DataFile
from agent.protocol.messages import ChunkRange
from agent.protocol.topics import DEVICE_HOST
from agent.source_config import SourceConfig
from agent.update.bundle_file import Held
from agent.update.http_source import read_http
from agent.update.source_tls import Credentials
from agent.update.transfer import Address, SourceError, Stop
from fleet_server.trust.ca import FleetCa, read_request

CONTENT = bytes(range(256)) * 8
FILE = DataFile(hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), 1000)
ALL = (ChunkRange(0, 2),)
PATH = f"/shoal/v1/artifacts/{FILE.digest}"


def enrolled(folder: Path, ca: FleetCa, name: str, fleet: str = "f") -> Config:
    """A device with a certificate of a CA."""
    key = new_key()
    request = read_request(signing_request(key, name))
    issued = ca.issue_device(request, name, fleet, dt.timedelta(days=1))
    identity = Identity(name, key, fingerprint(key), issued.pem, ca.bundle, fleet=fleet)
    save_identity(identity_folder(folder / name), identity)
    return Config(name, folder / name)


@pytest.fixture
def held(tmp_path: Path) -> Held:
    """Somewhere in a file, as in a bundle."""
    (tmp_path / "file").write_bytes(b"before" + CONTENT + b"after")
    return Held(tmp_path / "file", 6, len(CONTENT))


@pytest.fixture
def ca(tmp_path: Path) -> FleetCa:
    return FleetCa.open(tmp_path / "ca", "f")


@pytest.fixture
def serving(tmp_path: Path, held: Held, ca: FleetCa) -> Iterator[PeerServer]:
    credentials = Credentials(enrolled(tmp_path, ca, "one"))
    server = PeerServer("127.0.0.1:0", 100.0, {FILE.digest: held}.get, credentials.of_peers(), credentials.fleet)
    yield server
    server.stop()


def fetch(server: PeerServer, config: Config) -> bytes:
    credentials = Credentials(config)
    url = f"https://127.0.0.1:{server.port}{PATH}"
    address = Address(url, "", credentials.to_peers(), DEVICE_HOST, credentials.fleet)
    return b"".join(piece for _, piece in read_http(address, FILE, ALL, Stop()))


def test_a_device_of_the_fleet_fetches_from_another(tmp_path: Path, serving: PeerServer, ca: FleetCa) -> None:
    assert fetch(serving, enrolled(tmp_path, ca, "two")) == CONTENT


def test_others_get_nothing(tmp_path: Path, serving: PeerServer, ca: FleetCa) -> None:
    elsewhere = FleetCa.open(tmp_path / "other-ca", "f")
    for config in (enrolled(tmp_path, elsewhere, "stranger"), enrolled(tmp_path, ca, "tenant", "another")):
        with pytest.raises(SourceError):
            fetch(serving, config)
    nobody = ssl.create_default_context(cadata=ca.bundle)
    address = Address(f"https://127.0.0.1:{serving.port}{PATH}", "", nobody, DEVICE_HOST)
    with pytest.raises(SourceError):
        list(read_http(address, FILE, ALL, Stop()))


def test_a_device_can_not_pass_for_a_server(tmp_path: Path, serving: PeerServer, ca: FleetCa) -> None:
    """Its certificate is for no host, also not for one that is called as the device is."""
    config = enrolled(tmp_path, ca, "two")
    credentials = Credentials(config)
    for name in ("one", "localhost", "127.0.0.1"):
        address = Address(f"https://127.0.0.1:{serving.port}{PATH}", "", credentials.downloads(), name)
        with pytest.raises(SourceError, match="CERTIFICATE_VERIFY_FAILED"):
            list(read_http(address, FILE, ALL, Stop()))


def plain(held: Held) -> PeerServer:
    return PeerServer("127.0.0.1:0", 100.0, {FILE.digest: held}.get, None, "")


def ask(server: PeerServer, text: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(text)
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:  # it may have been thrown out by now
                raise
        found = b""
        with contextlib.suppress(ConnectionResetError):  # it may have been thrown out with something unread
            while piece := sock.recv(65536):
                found += piece
        return found


def test_requests_that_are_none_are_refused(held: Held) -> None:
    server = plain(held)
    head = f"GET {PATH} HTTP/1.1\r\nHost: d\r\n"
    try:
        assert ask(server, f"{head}Range: bytes=0-1\r\n\r\n".encode()).endswith(CONTENT[:2])
        assert b" 416 " in ask(server, f"{head}Range: bytes=99999-\r\n\r\n".encode())
        assert b" 404 " in ask(server, b"GET /shoal/v1/artifacts/../../etc/passwd HTTP/1.1\r\n\r\n")
        assert b" 404 " in ask(server, f"GET {PATH.replace(FILE.digest, 'b' * 64)} HTTP/1.1\r\n\r\n".encode())
        assert b" 405 " in ask(server, f"DELETE {PATH} HTTP/1.1\r\n\r\n".encode())
        assert b" 400 " in ask(server, b"\xff\xff\r\n\r\n")
        assert b" 431 " in ask(server, head.encode() + b"a" * 8100 + b": b\r\n\r\n")
        assert ask(server, b"GET / HTTP/1.1\r\n" + b"a" * 100_000) == b""
    finally:
        server.stop()


def test_who_only_holds_connections_is_thrown_out(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "HEAD_S", 0.5)
    server = plain(held)
    address = ("127.0.0.1", server.port)
    held_up = [socket.create_connection(address) for _ in range(peers.CONNECTIONS)]
    try:
        time.sleep(0.2)
        with socket.create_connection(address, timeout=5) as one_more:
            assert one_more.recv(10) == b"", "no more at once than it takes"
        time.sleep(0.6)
        assert ask(server, f"GET {PATH} HTTP/1.1\r\n\r\n".encode()).endswith(CONTENT)
    finally:
        for one in held_up:
            one.close()
        server.stop()


def test_the_rate_holds(held: Held) -> None:
    server = PeerServer("127.0.0.1:0", len(CONTENT) / 1e6 * 4, {FILE.digest: held}.get, None, "")
    began = time.monotonic()
    try:
        for _ in range(4):
            ask(server, f"GET {PATH} HTTP/1.1\r\n\r\n".encode())
    finally:
        server.stop()
    assert time.monotonic() - began >= 0.7, "four times, of four a second, but for the first"


@pytest.mark.parametrize("head", [b"", b"GET", b"GET /\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"a" * 9000])
def test_heads_that_are_none(head: bytes) -> None:
    with pytest.raises(BadRequestError):
        parse(head)


def test_nothing_is_served_without_a_certificate_beyond_this_machine(
    tmp_path: Path, held: Held, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config("d", tmp_path, sources=SourceConfig(serve=True, listen="0.0.0.0:0"))
    lan = Lan(config, Credentials(config), lambda _: held, lambda *_: None, found_inference=lambda *_: None)
    assert "enrol it" in caplog.text
    assert lan._server is None
    lan.stop()
    taken = Config("d", tmp_path, sources=SourceConfig(serve=True, listen="192.0.2.1:1", insecure_plain_http=True))
    with pytest.raises(AgentError, match=r"peers\.listen"):
        Lan(taken, Credentials(taken), lambda _: held, lambda *_: None, found_inference=lambda *_: None)


def test_a_missing_library_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zeroconf", None)
    config = Config("d", tmp_path, sources=SourceConfig(mdns=True))
    with pytest.raises(ConfigError, match=r"shoal\[lan\]"):
        Lan(config, Credentials(config), lambda _: None, lambda *_: None, found_inference=lambda *_: None)


def test_only_what_is_near_is_a_peer() -> None:
    assert usable_place(["8.8.8.8", "10.0.0.7"], 8472) == "10.0.0.7:8472"
    assert usable_place(["fd00::1"], 8472) == "[fd00::1]:8472"
    for addresses, port in ((["93.184.216.34"], 1), (["0.0.0.0"], 1), (["x"], 1), ([], 1), (["10.0.0.7"], 0)):
        assert usable_place(addresses, port) is None


def test_two_find_each_other_by_mdns(tmp_path: Path) -> None:
    """What one offers of each service."""
    pytest.importorskip("zeroconf")
    from agent.peers.mdns import ARTIFACTS, INFERENCE, Neighbours, Service

    found: dict[str, str | None] = {}
    try:
        one = Neighbours("one", [Service(kind, found.__setitem__) for kind in (ARTIFACTS, INFERENCE)])
        places = {ARTIFACTS: "127.0.0.1:8472", INFERENCE: "127.0.0.1:8473"}
        two = Neighbours("two", [Service(kind, lambda *_: None, place) for kind, place in places.items()])
    except ConfigError as error:
        pytest.skip(str(error))
    try:
        deadline = time.monotonic() + 15
        while len(found) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert {name.partition(".")[2]: place for name, place in found.items()} == places
        assert "two" not in next(iter(found)), "the network is not told a device's name"
    finally:
        two.stop()
        deadline = time.monotonic() + 15
        while set(found.values()) != {None} and time.monotonic() < deadline:
            time.sleep(0.1)
        one.stop()
    assert list(found.values()) == [None, None]
