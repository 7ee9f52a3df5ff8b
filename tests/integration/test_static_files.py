"""Static files that lie packed are sent as what they are."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from fleet_server.web import STATIC
from fleet_server.web.static_files import PackedFiles

SCRIPT = b"let shoal = 1;\n" * 100


@pytest.fixture
def files(tmp_path: Path) -> TestClient:
    (tmp_path / "packed.js.gz").write_bytes(gzip.compress(SCRIPT))
    (tmp_path / "plain.css").write_bytes(b"a {}")
    return serving(tmp_path)


def serving(folder: Path) -> TestClient:
    return TestClient(Starlette(routes=[Mount("/", PackedFiles(directory=folder))]))


@pytest.mark.parametrize(
    ("accepted", "packed"),
    [("gzip, br", True), ("br, gzip;q=0.5", True), ("br", False), ("", False), ("gzip;q=0, br", False)],
)
def test_a_packed_file_is_unpacked_by_whoever_can(files: TestClient, accepted: str, packed: bool) -> None:
    answer = files.get("/packed.js", headers={"Accept-Encoding": accepted})
    assert (answer.status_code, answer.content) == (200, SCRIPT)  # the client unpacks what says that it is packed
    assert ("content-encoding" in answer.headers) is packed
    assert answer.headers["content-type"].startswith("text/javascript")
    assert (int(answer.headers["content-length"]) < len(SCRIPT)) is packed
    assert answer.headers["vary"] == "Accept-Encoding"


def test_what_a_browser_has_is_not_sent_again(files: TestClient) -> None:
    headers = {"If-None-Match": files.get("/packed.js").headers["etag"]}
    assert files.get("/packed.js", headers=headers).status_code == 304


def test_other_files_are_as_they_are(files: TestClient) -> None:
    plain = files.get("/plain.css")
    assert (plain.content, "vary" in plain.headers) == (b"a {}", False)
    assert files.get("/nothing.js").status_code == 404
    assert files.post("/packed.js").status_code == 405
    assert b"SwaggerUIBundle" in serving(STATIC).get("/swagger-ui/swagger-ui-bundle.js").content
