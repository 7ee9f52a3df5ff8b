"""A real nginx as a mirror: a folder of artifacts as it lies, and the cache that the operations page has."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from agent.protocol.manifest import DataFile
from agent.protocol.messages import ChunkRange
from agent.protocol.ranges import content_range, wanted_range
from agent.update.http_source import read_http
from agent.update.transfer import Address, SourceError, Stop
from tests.fleet import free_port, wait_until

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
CONTENT = bytes(range(256)) * 40_000
FILE = DataFile(hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), 256 * 1024)
OPERATIONS = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


@pytest.fixture
def origin() -> Iterator[tuple[str, list[str]]]:
    """What a fleet server answers to a service token; with what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.headers["Authorization"] == "Bearer shoal_token"
            asked.append(self.headers["Range"])
            found = wanted_range({"range": self.headers["Range"]}, "", len(CONTENT))
            assert found is not None
            start, count = found
            self.send_response(206)
            self.send_header("Content-Range", content_range(start, count, len(CONTENT)))
            self.send_header("Content-Length", str(count))
            self.send_header("ETag", f'"{FILE.digest}"')
            self.end_headers()
            self.wfile.write(CONTENT[start : start + count])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def started(folder: Path, http: str) -> subprocess.Popen[bytes]:
    config = folder / "nginx.conf"
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {folder}/t;" for kind in kinds)
    config.write_text(
        f"daemon off; user root; pid {folder}/pid; error_log {folder}/log; events {{}}\n"
        f"http {{ access_log off; {temporary}\n{http} }}"
    )
    return subprocess.Popen([str(NGINX), "-p", str(folder), "-c", str(config)], stderr=subprocess.DEVNULL)


def fetched(url: str, *spans: ChunkRange) -> dict[int, bytes]:
    return dict(read_http(Address(url, plain=True), FILE, spans, Stop()))


def up(url: str) -> bool:
    try:
        fetched(url, ChunkRange(0, 0))
    except SourceError as error:
        return error.absent
    return True


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / FILE.digest).write_bytes(CONTENT)
    return tmp_path


def test_a_folder_of_artifacts(folder: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/{FILE.digest}"
    with started(folder, f"server {{ listen 127.0.0.1:{port}; root {folder}; }}") as nginx:
        try:
            wait_until("nginx", lambda: up(url), 20)
            found = fetched(url, ChunkRange(0, 1), ChunkRange(39, 39))
            assert found == {0: CONTENT[: 1 << 18], 1: CONTENT[1 << 18 : 2 << 18], 39: CONTENT[39 << 18 :]}
            with pytest.raises(SourceError) as caught:
                fetched(url.replace(FILE.digest, "b" * 64), ChunkRange(0, 0))
            assert caught.value.absent
        finally:
            nginx.terminate()


def test_the_cache_of_the_operations_page(folder: Path, origin: tuple[str, list[str]]) -> None:
    """But for TLS, which needs certificates: each part is asked for once, however many devices want it at once."""
    port, (server, asked) = free_port(), origin
    (recipe,) = re.findall(r"```nginx\n(.*?)```", OPERATIONS.read_text(), re.DOTALL)
    for said, here in (
        ("listen 8443 ssl", f"listen 127.0.0.1:{port}"),
        ("/var/cache/shoal", f"{folder}/cache"),
        ("https://fleet.example:7470", server),
        ("shoal_…", "shoal_token"),
    ):
        assert said in recipe
        recipe = recipe.replace(said, here)
    recipe = "\n".join(line for line in recipe.splitlines() if "ssl_" not in line)
    url = f"http://127.0.0.1:{port}/artifacts/{FILE.digest}"
    with started(folder, recipe) as nginx:
        try:
            wait_until("nginx", lambda: up(url), 20)
            with ThreadPoolExecutor(8) as devices:
                for found in devices.map(lambda _: fetched(url, ChunkRange(0, 39)), range(16)):
                    assert b"".join(found.values()) == CONTENT
            assert sorted(asked) == ["bytes=0-4194303", "bytes=4194304-8388607", "bytes=8388608-12582911"]
        finally:
            nginx.terminate()
