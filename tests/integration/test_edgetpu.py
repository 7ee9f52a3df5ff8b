"""The Edge TPU's compiler as a step: a script stands for it, which the project's machines do not have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName
from agent.runtimes import open_runtime
from converters.job import BuildJob, BuildResult, DataFile, SourceFile, Target
from converters.package import manifest_for
from converters.pipeline import build
from converters.steps.edgetpu_compile import MISSING, operators
from converters.steps.export import export_tflite, quiet

pytestmark = pytest.mark.filterwarnings("ignore:.*experimental_preserve_all_tensors:UserWarning")
PLAIN, COMPILED = "litert-static-int8", "litert-static-int8-edgetpu"
SAID = """Edge TPU Compiler version 16.0.384591198
Operator                       Count      Status

CONV_2D                        2          Mapped to Edge TPU
SOFTMAX                        1          Operation is working on an unsupported data type
"""
WORKS = f"""#!/bin/sh
for last; do :; done
printf '%s' '{SAID}'
out=$(dirname "$last")/model_edgetpu.tflite
cat "$last" > "$out"; printf edgetpu-custom-op >> "$out"
"""
FAILS = "#!/bin/sh\necho 'Edge TPU Compiler version 16.0.384591198'\necho 'ERROR: Model not quantized' >&2\nexit 1\n"
MAPS_NOTHING = WORKS.replace("Mapped to Edge TPU", "More than one subgraph is not supported")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    path = tmp_path_factory.mktemp("source") / "m.tflite"
    with quiet():
        export_tflite(net, [images()[:1]], path)
    return path


def images() -> np.ndarray:
    return np.random.default_rng(0).random((32, 3, 8, 8), dtype=np.float32)


def built(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, compiler: str | None) -> BuildResult:
    tools = folder / "bin"
    tools.mkdir()
    if compiler is not None:
        (tools / "edgetpu_compiler").write_text(compiler)
        (tools / "edgetpu_compiler").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    np.savez(folder / "c.npz", x=images())
    np.savez(folder / "e.npz", x=images(), y=np.zeros(32, np.int64))
    target = Target("p", RuntimeName.LITERT, ("edgetpu", "cpu"), (Precision.FP32, Precision.INT8), 1, 1, "latency", 100)
    job = BuildJob(
        (SourceFile(ModelFormat.TFLITE, "0" * 64, str(source)),),
        target,
        DataFile("1" * 64, str(folder / "c.npz")),
        DataFile("2" * 64, str(folder / "e.npz")),
    )
    (folder / "work").mkdir()
    return build(job, folder / "work", lambda _fraction, _step: None)


def test_the_compiled_file_is_picked_and_nobody_says_it_ran(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = built(source, tmp_path, monkeypatch, WORKS)
    made = {one.recipe: one for one in result.candidates}
    assert result.chosen is not None
    picked = result.candidates[result.chosen]
    assert picked.recipe == COMPILED
    assert picked.measurements is not None
    assert picked.measurements.provider == "xnnpack, before it was compiled"
    assert made[PLAIN].fate == f"would leave the edgetpu idle, for which {COMPILED} is compiled"
    assert picked.lineage is not None
    record = picked.lineage.passes[-1]
    assert record.name == "edgetpu-compile"
    assert (record.parameters["mapped"], record.parameters["on_cpu"]) == (2, 1)
    assert record.parameters["compiler"] == "16.0.384591198"
    assert record.bytes_after == record.bytes_before + len("edgetpu-custom-op")
    assert picked.digest != made[PLAIN].digest
    assert (tmp_path / "work" / str(picked.path)).read_bytes().endswith(b"edgetpu-custom-op")


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (None, MISSING),
        (FAILS, "can't compile this net: ERROR: Model not quantized"),
        (MAPS_NOTHING, "mapped no operator to the Edge TPU (2 CONV_2D: More than one subgraph"),
    ],
)
def test_what_is_not_compiled_says_why(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str | None, reason: str
) -> None:
    result = built(source, tmp_path, monkeypatch, compiler)
    made = {one.recipe: one for one in result.candidates}
    assert reason in (made[COMPILED].error or "")
    assert made[PLAIN].measurements is not None
    assert {path.name for path in (tmp_path / "work").glob("*.tflite")} >= {f"{PLAIN}.tflite"}
    assert not (tmp_path / "work" / f"{COMPILED}.tflite").exists()


def test_operators_of_the_compilers_table() -> None:
    assert operators(SAID) == (2, {"SOFTMAX: Operation is working on an unsupported data type": 1})


def test_a_plain_file_does_not_claim_the_accelerator(source: Path) -> None:
    """With or without the delegate's library: it has nothing to do with a file that was not compiled for it."""
    from converters.package import tflite_specs

    wanted = Target("p", RuntimeName.LITERT, ("edgetpu", "cpu"), ())
    manifest: Manifest = manifest_for(source, tflite_specs(source, None), ModelFormat.TFLITE, wanted)
    runtime = open_runtime(manifest, source)
    assert runtime.provider == "xnnpack"
    runtime.close()
