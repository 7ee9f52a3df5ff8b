"""Runtimes that packages bring: what is found, what is refused, and what is said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from agent import runtime_registry
from agent.protocol.codec import check_manifest
from agent.protocol.errors import WireError, WireErrorCode
from agent.runtimes import open_runtime
from agent.runtimes.base import RuntimeLoadError
from tests import vendor_runtime
from tests.unit.agent.test_provider_proof import classifier

FACTS = """
import sys
from pathlib import Path
from agent.hardware import measure
print(*(f"{one.name}={one.package}={one.version}={','.join(one.providers)}" for one in
        measure(Path(sys.argv[1]), tags={}).runtimes))
"""


def facts(folder: Path) -> list[str]:
    """What a fresh process finds."""
    done = subprocess.run([sys.executable, "-c", FACTS, str(folder)], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_what_a_package_brings_is_a_fact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vendor_runtime.install(tmp_path, monkeypatch)
    found = facts(tmp_path)
    assert "acme-npu=acme-runtime=3.1=npu" in found
    assert any(one.startswith("onnx=onnxruntime=") for one in found), "its name can't be taken"


def test_what_does_not_import_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vendor_runtime.install(tmp_path, monkeypatch, module="import no_such_driver")
    assert not [one for one in facts(tmp_path) if one.startswith("acme")]


def test_a_runtime_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    made, path = classifier(tmp_path)
    with pytest.raises(RuntimeLoadError, match=r"no runtime acme-npu, but onnx \(onnxruntime .*install") as caught:
        open_runtime(msgspec.structs.replace(made, runtime="acme-npu"), path)
    assert caught.value.code is WireErrorCode.RUNTIME_MISSING


def test_a_package_that_lacks_a_library_or_refuses_the_file_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = vendor_runtime.install(tmp_path, monkeypatch, module="import no_such_driver")
    monkeypatch.syspath_prepend(str(target))
    made, path = classifier(tmp_path)
    wanted = msgspec.structs.replace(made, runtime=vendor_runtime.NAME)
    with pytest.raises(RuntimeLoadError, match="no_such_driver") as caught:
        open_runtime(wanted, path)
    assert caught.value.code is WireErrorCode.RUNTIME_MISSING
    refusing = "class AcmeRuntime:\n    def __init__(self, *_):\n        raise KeyError('opset')\n"
    (target / "acme_runtime.py").write_text(refusing)
    with pytest.raises(RuntimeLoadError, match="opset") as caught:
        open_runtime(wanted, path)
    assert caught.value.code is WireErrorCode.LOAD_FAILED


@pytest.mark.parametrize("name", ["", "a b", "../x", "A", "x" * 65, "a\n"])
def test_a_name_that_is_none_is_refused_on_the_wire(tmp_path: Path, name: str) -> None:
    made, _ = classifier(tmp_path)
    with pytest.raises(WireError, match=r"manifest\.runtime"):
        check_manifest(msgspec.structs.replace(made, runtime=name))


def test_those_that_come_with_the_agent_are_found_without_metadata() -> None:
    assert runtime_registry.load("onnx").__name__ == "OnnxRuntime"
    assert runtime_registry.load("litert").__name__ == "LiteRtRuntime"
