"""PyTorch: programs of `torch.export` (`.pt2`), on the CPU or on CUDA.

Loading such a file can run code, so the server takes none from outside: it makes them of weights for nets that an
operator registered, and a device runs what TUF metadata vouches for, as of every runtime. A provider is believed only
when an inference on it worked.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import Manifest
from agent.runtimes.base import Array, RuntimeLoadError, Tensors, reason, reasons, to_file, to_source, warm_up_inputs

CPU, CUDA = "cpu", "cuda"


class TorchRuntime:
    """A `torch.export` program, loaded. See `agent.runtimes.base.Runtime`.

    A program takes and gives tensors in an order, which is that of the manifest, and has no names for them.
    """

    def __init__(self, manifest: Manifest, path: Path, compiled: Path | None = None) -> None:  # noqa: ARG002
        import torch

        self._torch = torch
        self._manifest = manifest
        self.version = f"torch {importlib.metadata.version('torch')}"
        self._program = self._read(path)
        self._net: Any = None
        self.provider, self.fell_back = self._open()
        self._program = None  # on a GPU its weights are there a second time

    def run(self, inputs: Tensors) -> Tensors:
        """One inference; see `agent.runtimes.base.Runtime`."""
        torch = self._torch
        if torch.get_num_threads() != self._manifest.threads:  # each thread has its own number, as OpenMP has it
            torch.set_num_threads(self._manifest.threads)
        with torch.inference_mode():
            given = [self._tensor(to_file(spec, inputs[spec.name])) for spec in self._manifest.inputs]
            found = list(_leaves(self._net(*given)))
        if len(found) != len(self._manifest.outputs):
            raise ValueError(f"it answers {len(found)} tensors, and its manifest names {len(self._manifest.outputs)}")
        return {
            spec.name: to_source(spec, value.cpu().numpy())
            for spec, value in zip(self._manifest.outputs, found, strict=True)
        }

    def close(self) -> None:
        """Let the program go, and what it held of a GPU."""
        self._net = None
        if self.provider == CUDA:
            self._torch.cuda.empty_cache()

    def _read(self, path: Path) -> Any:
        with path.open("rb") as file:  # by its name it would have to end in `.pt2`
            try:
                return self._torch.export.load(file)
            except Exception as error:
                detail = (
                    f"{self.version} refused the file: {reason(error)}; a program loads in the version of torch that "
                    "made it or a newer one"
                )
                raise RuntimeLoadError(WireErrorCode.LOAD_FAILED, detail) from error

    def _open(self) -> tuple[str, str]:
        """The first provider that proves itself, and why none before it did."""
        missed: list[str] = []
        for provider in dict.fromkeys((*(self._manifest.providers or ()), CPU)):
            why = self._try(provider)
            if why is None:
                return provider, reasons(missed)
            missed.append(f"{provider}: {why}")
        raise RuntimeLoadError(WireErrorCode.LOAD_FAILED, "; ".join(missed))

    def _try(self, provider: str) -> str | None:
        """Have a provider run the program once; why it can't, or None."""
        if provider not in {CPU, CUDA}:
            return f"torch has no such provider here, but {CPU} and {CUDA}"
        if provider == CUDA and not self._torch.cuda.is_available():
            return f"{self.version} finds no GPU: it is a build for CPUs alone, or driver or device are missing"
        self._device = provider
        try:
            self._net = self._moved(provider).module()
            self.run(warm_up_inputs(self._manifest))
        except Exception as error:  # noqa: BLE001 (operators raise what they like)
            self._net = None
            return f"a first inference failed: {reason(error)}"
        return None

    def _moved(self, device: str) -> Any:
        """The program with its weights, and what it makes by itself, on a device."""
        from torch.export.passes import move_to_device_pass

        return move_to_device_pass(self._program, device)

    def _tensor(self, array: Array) -> Any:
        # torch shares it, and warns of what it may not write to; np.ascontiguousarray would make a row of a scalar
        whole = np.asarray(array, order="C")
        return self._torch.from_numpy(whole if whole.flags.writeable else whole.copy()).to(self._device)


def _leaves(answer: Any) -> Iterator[Any]:
    """The tensors of an answer in their order, which may be in lists, tuples and dictionaries."""
    if isinstance(answer, dict):
        answer = list(answer.values())
    if not isinstance(answer, (list, tuple)):
        yield answer
        return
    for one in answer:
        yield from _leaves(one)
