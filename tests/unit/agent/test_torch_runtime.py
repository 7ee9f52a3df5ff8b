"""Programs of torch.export in the agent's runtime: what they take, what runs them, and what is said otherwise."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from agent.runtimes import open_runtime
from agent.runtimes.base import RuntimeLoadError
from converters.steps.torch_export import export_program


class Net(nn.Module):
    """Looks tokens up, adds a float input, and answers two tensors; one buffer is made on the way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out = nn.Embedding(10, 4), nn.Linear(4, 3)

    def forward(self, tokens: torch.Tensor, extra: torch.Tensor) -> dict[str, torch.Tensor]:
        seen = self.table(tokens).mean(1) + extra + torch.arange(4)
        return {"scores": self.out(seen), "likely": self.out(seen).argmax(1)}


def inputs(rows: int) -> dict[str, Any]:
    rng = np.random.default_rng(rows)
    return {
        "tokens": rng.integers(0, 10, (rows, 5)),
        "extra": rng.standard_normal((rows, 4)).astype(np.float32),
    }


def program(folder: Path, net: nn.Module, *providers: str, **changes: Any) -> tuple[Manifest, Path]:
    path = folder / "0123"  # as the store names files: by digest, without an end
    export_program(net, list(inputs(8).values()), path)
    made = Manifest(
        "0" * 64, path.stat().st_size, 65536, "m", "1", "v", "p",
        ModelFormat.PT2, RuntimeName.TORCH, Precision.FP32,
        (TensorSpec("tokens", "int64", (-1, 5)), TensorSpec("extra", "float32", (-1, 4))),
        (TensorSpec("linear", "float32", (-1, 3)), TensorSpec("argmax", "int64", (-1,))),
        providers=providers,
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes), path


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_it_answers_as_the_net_for_any_number_of_rows(tmp_path: Path, rows: int) -> None:
    net = Net().eval()
    runtime = open_runtime(*program(tmp_path, net), may_fall_back=False)
    given = inputs(rows)
    for one in given.values():
        one.flags.writeable = False  # as arrays are that a request's bytes hold
    found = runtime.run(given)
    with torch.no_grad():
        wanted = net(*map(torch.tensor, given.values()))
    np.testing.assert_allclose(found["linear"], wanted["scores"].numpy(), rtol=1e-5, atol=1e-6)
    assert found["argmax"].tolist() == wanted["likely"].tolist()
    assert (runtime.version, runtime.provider, runtime.fell_back) == (f"torch {torch.__version__}", "cpu", "")
    runtime.close()


class Scaled(nn.Module):
    """Rows times a number that is one for all of them."""

    def forward(self, rows: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return rows * times


def test_a_scalar_is_given_as_one(tmp_path: Path) -> None:
    """It counts no rows: the batch is free all the same, and the program gets no row of one in its place."""
    path = tmp_path / "scaled.pt2"
    export_program(Scaled().eval(), [np.ones((8, 4), np.float32), np.array(2, np.float32)], path)
    specs = (TensorSpec("rows", "float32", (-1, 4)), TensorSpec("times", "float32", ()))
    made, _ = program(tmp_path, Net().eval(), inputs=specs, outputs=(TensorSpec("y", "float32", (-1, 4)),))
    runtime = open_runtime(made, path)
    given = inputs(5)["extra"]
    np.testing.assert_array_equal(
        runtime.run({"rows": given, "times": np.array(3, np.float32)})["y"], given * np.float32(3)
    )


def test_the_file_holds_no_rows_and_is_the_same_every_time(tmp_path: Path) -> None:
    net = Net().eval()
    made, others = [], [inputs(8), {name: value[::-1] for name, value in inputs(8).items()}]
    for number, rows in enumerate(others):
        export_program(net, list(rows.values()), tmp_path / f"{number}.pt2")
        made.append((tmp_path / f"{number}.pt2").read_bytes())
    assert made[0] == made[1]
    assert inputs(8)["extra"][:2].tobytes() not in made[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_can_not_run_it_is_named(tmp_path: Path) -> None:
    runtime = open_runtime(*program(tmp_path, Net().eval(), "tensorrt", "cuda", "cpu"))
    assert runtime.provider == "cpu"
    assert runtime.fell_back.startswith("tensorrt: torch has no such provider here, but cpu and cuda; cuda: torch ")
    assert "finds no GPU" in runtime.fell_back
    with pytest.raises(RuntimeLoadError, match="cuda is wanted first and can't run it here") as caught:
        open_runtime(*program(tmp_path, Net().eval(), "cuda"), may_fall_back=False)
    assert caught.value.code is WireErrorCode.PROVIDER_UNAVAILABLE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_answers_as_the_cpu_does(tmp_path: Path) -> None:
    net = Net().eval()
    runtime = open_runtime(*program(tmp_path, net, "cuda"), may_fall_back=False)
    assert runtime.provider == "cuda"
    on_cpu = open_runtime(*program(tmp_path, net)).run(inputs(3))
    np.testing.assert_allclose(runtime.run(inputs(3))["linear"], on_cpu["linear"], rtol=1e-3, atol=1e-4)


def test_a_damaged_file_is_refused_with_the_remedy(tmp_path: Path) -> None:
    made, path = program(tmp_path, Net().eval(), "cuda")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(RuntimeLoadError, match=r"refused the file.*or a newer one") as caught:
        open_runtime(made, path, may_fall_back=False)
    assert caught.value.code is WireErrorCode.LOAD_FAILED


def test_a_manifest_of_another_program_is_refused(tmp_path: Path) -> None:
    made, path = program(tmp_path, Net().eval())
    with pytest.raises(RuntimeLoadError, match="answers 2 tensors, and its manifest names 1"):
        open_runtime(msgspec.structs.replace(made, outputs=made.outputs[:1]), path)


def test_it_uses_the_threads_of_its_manifest_in_whatever_thread_it_runs(tmp_path: Path) -> None:
    usual = torch.get_num_threads()
    seen: list[int] = []
    try:
        runtime = open_runtime(*program(tmp_path, Net().eval(), threads=3))

        def work() -> None:
            runtime.run(inputs(1))
            seen.append(torch.get_num_threads())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(usual)
    assert seen == [3]


def test_it_is_a_fact_of_the_device_without_being_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from agent.hardware import measure; "
        "(found,) = measure(Path(sys.argv[1]), tags={}, runtimes=('torch',)).runtimes; "
        "print(found.package, found.version, *found.providers, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    package, version, *providers, imported = done.stdout.split()
    assert (package, imported) == ("torch", "False")
    assert torch.__version__.startswith(version)
    assert providers[0] == "cpu"
    assert ("cuda" in providers) is (torch.version.cuda is not None)
