"""From a torch net to source forms. This runs the net's code, so only where that is trusted.

On the pusher's own machine that is any code; on a server it is an architecture that an operator registered.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.protocol.manifest import ModelFormat
from converters.errors import ConversionError
from converters.steps.torch_export import export_program
from converters.training.refit import is_marked, refit

TOLERANCE = 1e-4


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what libraries print, from C++ too, off the terminal; after an exception its end is shown."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as chatter:
        try:
            os.dup2(chatter.fileno(), 1)
            os.dup2(chatter.fileno(), 2)
            yield
        except BaseException:
            size = chatter.tell()
            os.write(kept[1], os.pread(chatter.fileno(), 2000, max(0, size - 2000)))
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, saved in enumerate(kept, start=1):
                os.dup2(saved, number)
                os.close(saved)


def load_net(spec: str, weights: Path | None) -> Any:
    """Build the net that `net.py:build` names and fill in its weights.

    Args:
        spec: a Python file and a function in it without parameters that returns a `torch.nn.Module`.
        weights: safetensors; None for the net as it is built.

    Raises:
        ConversionError: naming what is missing or does not fit.
    """
    net = net_builder(spec)()
    return net.eval() if weights is None else fill(net, weights, "--weights")


def fill(net: Any, weights: Path, field: str) -> Any:
    """Give a fresh net its weights; one that was pruned gets the shapes they have.

    Args:
        net: changed in place, and returned in evaluation mode.
        weights: safetensors.
        field: of the request, for errors.

    Raises:
        ConversionError: `bad_weights`, when they are not readable or do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(str(weights))
        if is_marked(weights):
            refit(net, state)
    except (SafetensorError, OSError) as error:
        raise ConversionError("bad_weights", f"{field}: {weights.name} is not readable safetensors: {error}") from None
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise ConversionError("bad_weights", f"{field}: the weights do not fit the net: {error}") from None
    return net.eval()


def net_builder(spec: str) -> Callable[[], Any]:
    """The function that `net.py:build` names: the file is run.

    Raises:
        ConversionError: naming what is missing.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ConversionError("bad_net", f"there is no file {file!r}: give it as net.py:function")
    known = f"shoal_pushed_net_{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:8]}"
    module_spec = importlib.util.spec_from_file_location(known, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[known] = module
    module_spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not callable(found):
        raise ConversionError("bad_net", f"{file} has no function {name!r}")
    builder: Callable[[], Any] = found
    return builder


def export_onnx(net: Any, examples: list[npt.NDArray[Any]], path: Path, names: list[str]) -> None:
    """Write the net as one ONNX file with a free batch dimension, and check it against the net.

    Args:
        net: in evaluation mode.
        examples: one array an input; the first axis counts rows.
        path: where to.
        names: of the inputs.

    Raises:
        ConversionError: when the file answers otherwise than the net.
    """
    import onnxruntime
    import torch

    tensors = tuple(torch.from_numpy(np.ascontiguousarray(array[:2])) for array in examples)
    batch = torch.export.Dim("batch", min=1, max=4096)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            net,
            tensors,
            dynamo=True,
            input_names=names,
            dynamic_shapes=tuple({0: batch} for _ in tensors),
            verbose=False,
        )
        program.save(str(path), external_data=False)
        expected = net(*tensors)
    first = (expected[0] if isinstance(expected, (tuple, list)) else expected).numpy()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), tensors, strict=True)}
    found = session.run(None, feed)[0]
    if found.shape != first.shape or not np.allclose(found, first, rtol=1e-3, atol=TOLERANCE):
        raise ConversionError(
            "export_differs", "the exported ONNX file answers otherwise than the net: report this net"
        )


def export_forms(
    net: Any,
    inputs: dict[str, npt.NDArray[Any]],
    folder: Path,
    stem: str,
    *,
    tflite: bool = True,
    program: bool = False,
) -> dict[ModelFormat, Path]:
    """Write a net in the forms that can be made here: ONNX, and TFLite where litert-torch is installed.

    Args:
        net: in evaluation mode.
        inputs: example rows by name, in the order of the net's parameters.
        folder: where to.
        stem: the files' name without its end.
        tflite: whether anybody wants that form, which takes longest.
        program: whether a program of torch is wanted too.

    Raises:
        ConversionError: when a form can't be made, or answers otherwise than the net.
    """
    forms = {ModelFormat.ONNX: folder / f"{stem}.onnx"}
    examples = list(inputs.values())
    try:
        with quiet():
            export_onnx(net, examples, forms[ModelFormat.ONNX], list(inputs))
            if tflite and can_export_tflite():
                forms[ModelFormat.TFLITE] = folder / f"{stem}.tflite"
                export_tflite(net, examples, forms[ModelFormat.TFLITE])
            if program:
                forms[ModelFormat.PT2] = folder / f"{stem}.pt2"
                export_program(net, examples, forms[ModelFormat.PT2])
    except ConversionError:
        raise
    except Exception as error:
        detail = f"the net can't be exported ({type(error).__name__}: {str(error)[:300]}): torch.export must follow it"
        raise ConversionError("not_exportable", detail) from error
    return forms


def can_export_tflite() -> bool:
    """Whether litert-torch is installed here."""
    return importlib.util.find_spec("litert_torch") is not None


def export_tflite(net: Any, examples: list[npt.NDArray[Any]], path: Path) -> None:
    """Write the net as a TFLite file for batches of one."""
    import litert_torch
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = litert_torch.convert(net, tuple(torch.from_numpy(np.ascontiguousarray(a[:1])) for a in examples))
        model.export(str(path))
