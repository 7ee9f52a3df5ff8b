"""A variant as what serves models beyond devices: a model repository of Triton, or an InferenceService of KServe.

The text is pure; `export` downloads, checks and writes, the whole folder or nothing of it.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from fleet_server.sdk.client import Client, Json, segment
from fleet_server.sdk.errors import ExportError

TYPES = {
    "float32": "FP32", "float16": "FP16", "float64": "FP64", "bfloat16": "BF16", "int8": "INT8", "int16": "INT16",
    "int32": "INT32", "int64": "INT64", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "bool": "BOOL", "string": "STRING",
}  # fmt: skip
MODEL_FILE = "model.onnx"
LABELS_FILE = "labels.txt"
STORAGE = "pvc://models"
# What Triton's ONNX Runtime backend names execution providers of a profile, beside CUDA and the CPU.
ACCELERATORS = {"tensorrt": ("gpu", "tensorrt"), "openvino": ("cpu", "openvino")}
GPU = frozenset({"cuda", "tensorrt"})
_PLAIN = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")


class ExportFormat(StrEnum):
    """What to write."""

    TRITON = "triton"
    KSERVE = "kserve"


@dataclass(frozen=True)
class Served:
    """A model as a server of models is to know it.

    Attributes:
        name: of it.
        version: a number from 1.
        inputs: with `name`, `dtype` and `shape`, -1 for a free size.
        outputs: likewise.
        labels: class names by index; empty for none.
        max_batch: the largest batch worth making.
        threads: of one inference.
        providers: execution providers in the order to try.
    """

    name: str
    version: int
    inputs: Sequence[Json]
    outputs: Sequence[Json]
    labels: Sequence[str]
    max_batch: int
    threads: int
    providers: Sequence[str]

    @property
    def batches(self) -> bool:
        """Whether the first axis of every tensor counts rows, and is free."""
        return all(one["shape"][:1] == [-1] for one in (*self.inputs, *self.outputs))

    @property
    def on_gpu(self) -> bool:
        """Whether it is to run on a GPU."""
        return bool(self.providers) and self.providers[0] in GPU


def triton_config(served: Served) -> str:
    """`config.pbtxt`: text of `inference.ModelConfig` for the ONNX Runtime backend.

    Raises:
        ExportError: for a tensor of a type that Triton does not have.
    """
    batch = served.max_batch if served.batches else 0
    lines = [
        f"name: {_quoted(served.name)}",
        'backend: "onnxruntime"',
        f"default_model_filename: {_quoted(MODEL_FILE)}",
        f"max_batch_size: {batch}",
    ]
    for field, tensors in (("input", served.inputs), ("output", served.outputs)):
        for number, one in enumerate(tensors):
            labelled = field == "output" and number == 0 and bool(served.labels)
            lines += _tensor(field, one, batched=batch > 0, labels=labelled)
    kind = "KIND_GPU" if served.on_gpu else "KIND_CPU"
    lines += ["instance_group [", f"  {{ kind: {kind} count: 1 }}", "]"]
    if batch > 1:
        lines.append("dynamic_batching { }")
    lines += _parameter("intra_op_thread_count", str(served.threads))
    accelerator = ACCELERATORS.get(served.providers[0]) if served.providers else None
    if accelerator is not None:
        where, name = accelerator
        lines += [
            "optimization {",
            f"  execution_accelerators {{ {where}_execution_accelerator [ {{ name: {_quoted(name)} }} ] }}",
            "}",
        ]
    return "\n".join(lines) + "\n"


def _tensor(field: str, one: Mapping[str, Any], *, batched: bool, labels: bool) -> list[str]:
    kind = TYPES.get(one["dtype"])
    if kind is None:
        raise ExportError(f"{field} {one['name']!r} holds {one['dtype']}, which Triton does not have")
    sizes = one["shape"][1:] if batched else one["shape"]
    # Triton wants a size: a scalar a row is a vector of one there, and reshaped to none.
    dims = ", ".join(map(str, sizes)) or "1"
    lines = [f"{field} [", "  {", f"    name: {_quoted(one['name'])}", f"    data_type: TYPE_{kind}"]
    lines.append(f"    dims: [ {dims} ]")
    if not sizes:
        lines.append("    reshape: { shape: [ ] }")
    if labels:
        lines.append(f"    label_filename: {_quoted(LABELS_FILE)}")
    return [*lines, "  }", "]"]


def _parameter(key: str, value: str) -> list[str]:
    return ["parameters {", f"  key: {_quoted(key)}", f"  value: {{ string_value: {_quoted(value)} }}", "}"]


def _quoted(text: str) -> str:
    """A string of protobuf's text format; its escapes are JSON's for what a name can hold."""
    return json.dumps(text, ensure_ascii=False)


def inference_service(served: Served, storage: str) -> Json:
    """KServe's `InferenceService` of a model repository of Triton's, by its serving runtime for Triton.

    Args:
        served: the model.
        storage: URI of the repository: the folder that holds the model's.
    """
    predictor: Json = {
        "model": {
            "modelFormat": {"name": "triton", "version": "2"},
            "runtime": "kserve-tritonserver",
            "protocolVersion": "v2",
            "storageUri": storage,
        }
    }
    if served.on_gpu:
        predictor["model"]["resources"] = {"limits": {"nvidia.com/gpu": "1"}}
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": kubernetes_name(served.name)},
        "spec": {"predictor": predictor},
    }


def kubernetes_name(name: str) -> str:
    """A model's name as Kubernetes takes names: RFC 1035, at most 63 characters.

    Raises:
        ExportError: when nothing of it is left.
    """
    found = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:63].strip("-")
    if not found or not found[0].isalpha():
        found = f"model-{found}".strip("-")[:63].strip("-")
    return found


def export(
    client: Client,
    name: str,
    version: str,
    kind: ExportFormat,
    output: Path,
    *,
    profile: str | None = None,
    storage: str = STORAGE,
) -> Path:
    """Write a variant as a model repository below a folder.

    Args:
        client: of the server that has it.
        name: of the model.
        version: of it.
        kind: what to write.
        output: made when absent; gets one folder, named as the model.
        profile: whose variant; None: the only one that can be served so.
        storage: for KServe, the URI below which `output` will be put.

    Returns:
        The model's folder.

    Raises:
        ExportError: when no variant fits, or something is there already.
        ApiError: when the server refuses.
    """
    if not _PLAIN.match(name):
        raise ExportError(f"{name[:80]!r} can't name a folder: letters, digits, '.', '_' and '-' can")
    if kind is ExportFormat.KSERVE and not re.match(r"^[a-z0-9]+://\S+\Z", storage):
        raise ExportError(f"storage: {storage!r} is no URI such as pvc://models or s3://bucket/models")
    place = output / name
    if place.exists():
        raise ExportError(f"{place} is there already: remove it, or name another folder")
    shown = client.get(f"/models/{segment(name)}/versions/{segment(version)}")
    variant = _variant(client, shown["reference"], profile)
    spec = client.get(f"/profiles/{segment(variant['profile'])}")["spec"]
    served = Served(
        name=name,
        version=max(1, int(version)) if version.isdecimal() and len(version) < 10 else 1,
        inputs=shown["inputs"],
        outputs=shown["outputs"],
        labels=shown["labels"],
        max_batch=spec["max_batch"],
        threads=spec["threads"],
        providers=spec["providers"],
    )
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".export-") as part:
        folder = Path(part) / name
        repository = folder if kind is ExportFormat.TRITON else folder / "models" / name
        _write_repository(served, repository, lambda path: _download(client, variant["digest"], path))
        if kind is ExportFormat.KSERVE:
            text = _yaml(inference_service(served, f"{storage.rstrip('/')}/{name}/models"))
            (folder / "inference-service.yaml").write_text(text)
        folder.rename(place)
    return place


def _write_repository(served: Served, folder: Path, download: Callable[[Path], None]) -> None:
    (folder / str(served.version)).mkdir(parents=True)
    (folder / "config.pbtxt").write_text(triton_config(served))
    if served.labels:
        (folder / LABELS_FILE).write_text("".join(f"{one}\n" for one in served.labels))
    download(folder / str(served.version) / MODEL_FILE)


def _variant(client: Client, reference: str, profile: str | None) -> Json:
    """The variant to export: ready, and in a format that ONNX Runtime loads."""
    ready = [
        one
        for one in client.items("/variants", version=reference, profile=profile)
        if one["state"] == "ready" and one["digest"]
    ]
    fitting = [one for one in ready if one["runtime"] == "onnx"]
    if not fitting:
        others = ", ".join(f"{one['profile']} ({one['runtime']})" for one in ready) or "none"
        remedy = f"build one: `shoal variant build {reference} --profile …`"
        raise ExportError(f"{reference} has no ready variant for ONNX Runtime (ready: {others}): {remedy}")
    if len(fitting) > 1:
        names = ", ".join(sorted(one["profile"] for one in fitting))
        raise ExportError(f"{reference} has variants for {names}: choose one by its profile")
    found: Json = fitting[0]
    return found


def _download(client: Client, digest: str, path: Path) -> None:
    """The artifact, checked against its digest."""
    found = hashlib.sha256()
    with path.open("wb") as file:

        def take(piece: bytes) -> None:
            found.update(piece)
            file.write(piece)

        client.download(f"/artifacts/{segment(digest)}", take)
    if found.hexdigest() != digest:
        raise ExportError(f"what the server gave for {digest[:12]}… is another file: nothing was written")


def _yaml(document: Json) -> str:
    import yaml

    text: str = yaml.safe_dump(document, sort_keys=False)
    return text
