"""Which recipes are worth trying, and which result is picked: pure. Measurement decides; a rule of thumb never does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from agent.protocol.manifest import ModelFormat, Precision, RuntimeName
from converters.job import Candidate, Measurements, Target
from converters.step import Parameter, Planned, Recipe, Step
from converters.steps import (
    edgetpu_compile,
    keep,
    litert_half,
    litert_quantize,
    litert_share,
    litert_signature,
    onnx_dynamic,
    onnx_equalize,
    onnx_fp16,
    onnx_fuse,
    onnx_static,
    onnx_weight_only,
)

_ONNX_TOOLS = ("onnx", "onnxruntime", "numpy")
_LITERT_TOOLS = ("ai-edge-litert", "ai-edge-quantizer", "numpy")
NOISE = 1.03  # two timings of the same file differ by so much
SAME_SIZE = 1.05


def _onnx(
    name: str, precision: Precision, *steps: Planned, needs: bool = False, providers: tuple[str, ...] = ()
) -> Recipe:
    return Recipe(name, RuntimeName.ONNX, precision, ModelFormat.ONNX, needs, steps, _ONNX_TOOLS, providers=providers)


def _litert(name: str, precision: Precision, *steps: Planned, needs: bool = False) -> Recipe:
    return Recipe(name, RuntimeName.LITERT, precision, ModelFormat.TFLITE, needs, steps, _LITERT_TOOLS)


def _static(
    run: Step, name: str, calibration: str, activations: str = "uint8", weight_bits: int = 8
) -> tuple[Planned, Planned]:
    parameters: dict[str, Parameter] = {
        "calibration": calibration,
        "activations": activations,
        "per_channel": True,
        "weight_bits": weight_bits,
    }
    return Planned("onnx-prepare", onnx_static.prepare), Planned(name, run, parameters)


def _equalized(calibration: str) -> tuple[Planned, ...]:
    prepared, quantized = _static(onnx_static.static_int8, "onnx-static-int8", calibration)
    return prepared, Planned("onnx-equalize", onnx_equalize.equalize), quantized


def _dynamic(operators: str, *, per_channel: bool, weight_bits: int = 8) -> Planned:
    parameters: dict[str, Parameter] = {
        "operators": operators,
        "per_channel": per_channel,
        "weight_bits": weight_bits,
    }
    return Planned("onnx-dynamic-int8", onnx_dynamic.dynamic_int8, parameters)


def _blocks(bits: int) -> Planned:
    return Planned("onnx-weight-only", onnx_weight_only.weight_only, {"bits": bits, "block": 32})


_SHARED = Planned("litert-share", litert_share.share_vectors)


def _edge(run: Step, recipe: str) -> tuple[Planned, ...]:
    signed = Planned("litert-signature", litert_signature.add_signature)
    wide = Planned("litert-widen", litert_half.widen_constants)
    return signed, wide, Planned("litert-quantize", run, {"recipe": recipe}), _SHARED


_SUMS = Planned("onnx-keep-sums", onnx_fuse.keep_sums)


def _fused(*, half: bool) -> Planned:
    return Planned("onnx-fuse-attention", onnx_fuse.fuse_attention, {"half": half})


_STATIC, _MIXED = onnx_static.static_int8, onnx_static.mixed_int8
RECIPES: tuple[Recipe, ...] = (
    _onnx("onnx-fp32", Precision.FP32, Planned("keep", keep.keep)),
    _onnx("onnx-sums-fp32", Precision.FP32, _SUMS, providers=("cpu",)),
    _onnx("onnx-fused-fp32", Precision.FP32, _fused(half=False), providers=("cuda",)),
    _onnx("onnx-fp16", Precision.FP16, Planned("onnx-fp16", onnx_fp16.to_fp16, {"keep_io_types": True})),
    _onnx("onnx-fused-fp16", Precision.FP16, _fused(half=True), providers=("cuda",)),
    _onnx("onnx-static-u8s8", Precision.INT8, *_static(_STATIC, "onnx-static-int8", "MinMax"), needs=True),
    _onnx(
        "onnx-static-u8s8-percentile", Precision.INT8, *_static(_STATIC, "onnx-static-int8", "Percentile"), needs=True
    ),
    _onnx("onnx-static-u8s8-entropy", Precision.INT8, *_static(_STATIC, "onnx-static-int8", "Entropy"), needs=True),
    _onnx(
        "onnx-static-u8s7",
        Precision.INT8,
        *_static(_STATIC, "onnx-static-int8", "MinMax", weight_bits=7),
        needs=True,
        providers=("cpu",),
    ),
    _onnx(
        "onnx-static-u8s7-percentile",
        Precision.INT8,
        *_static(_STATIC, "onnx-static-int8", "Percentile", weight_bits=7),
        needs=True,
        providers=("cpu",),
    ),
    _onnx("onnx-static-s8s8", Precision.INT8, *_static(_STATIC, "onnx-static-int8", "MinMax", "int8"), needs=True),
    _onnx("onnx-dynamic", Precision.DYNAMIC_INT8, _dynamic("", per_channel=False)),
    _onnx("onnx-dynamic-matmul", Precision.DYNAMIC_INT8, _dynamic("MatMul,Gemm", per_channel=False)),
    _onnx("onnx-dynamic-matmul-channels", Precision.DYNAMIC_INT8, _dynamic("MatMul,Gemm", per_channel=True)),
    _onnx(
        "onnx-dynamic-matmul-channels-s7",
        Precision.DYNAMIC_INT8,
        _dynamic("MatMul,Gemm", per_channel=True, weight_bits=7),
        providers=("cpu",),
    ),
    _onnx(
        "onnx-sums-dynamic-matmul",
        Precision.DYNAMIC_INT8,
        _SUMS,
        _dynamic("MatMul,Gemm", per_channel=False),
        providers=("cpu",),
    ),
    _onnx(
        "onnx-sums-dynamic-matmul-channels",
        Precision.DYNAMIC_INT8,
        _SUMS,
        _dynamic("MatMul,Gemm", per_channel=True),
        providers=("cpu",),
    ),
    _onnx(
        "onnx-sums-dynamic-matmul-channels-s7",
        Precision.DYNAMIC_INT8,
        _SUMS,
        _dynamic("MatMul,Gemm", per_channel=True, weight_bits=7),
        providers=("cpu",),
    ),
    _onnx("onnx-weights-int8", Precision.WEIGHT_INT8, _blocks(8)),
    _onnx("onnx-weights-int4", Precision.WEIGHT_INT4, _blocks(4)),
    Recipe(
        "torch-fp32",
        RuntimeName.TORCH,
        Precision.FP32,
        ModelFormat.PT2,
        needs_calibration=False,
        steps=(Planned("keep", keep.keep),),
        tools=("torch",),
    ),
    _litert("litert-fp32", Precision.FP32, Planned("keep", keep.keep)),
    _litert("litert-static-int8", Precision.INT8, *_edge(litert_quantize.static, "static_wi8_ai8"), needs=True),
    Recipe(
        "litert-static-int8-edgetpu",
        RuntimeName.LITERT,
        Precision.INT8,
        ModelFormat.TFLITE,
        needs_calibration=True,
        steps=(
            *_edge(litert_quantize.static, "static_wi8_ai8"),
            Planned("edgetpu-compile", edgetpu_compile.compile_for_edge_tpu),
        ),
        tools=_LITERT_TOOLS,
        compiled_for="edgetpu",
    ),
    _litert("litert-static-int16", Precision.INT16, *_edge(litert_quantize.static, "static_wi8_ai16"), needs=True),
    _litert(
        "litert-dynamic-int8", Precision.DYNAMIC_INT8, *_edge(litert_quantize.without_calibration, "dynamic_wi8_afp32")
    ),
    _litert(
        "litert-weights-int8",
        Precision.WEIGHT_INT8,
        *_edge(litert_quantize.without_calibration, "weight_only_wi8_afp32"),
    ),
    _litert(
        "litert-weights-int4",
        Precision.WEIGHT_INT4,
        *_edge(litert_quantize.without_calibration, "weight_only_wi4_afp32"),
    ),
)
# Tried only when every plain candidate of the same precision loses too much.
REPAIRS: tuple[Recipe, ...] = (
    _onnx("onnx-equalized-u8s8", Precision.INT8, *_equalized("MinMax"), needs=True),
    _onnx("onnx-equalized-u8s8-percentile", Precision.INT8, *_equalized("Percentile"), needs=True),
    _onnx("onnx-mixed-u8s8", Precision.INT8, *_static(_MIXED, "onnx-mixed-int8", "MinMax"), needs=True),
    _onnx("onnx-mixed-u8s8-percentile", Precision.INT8, *_static(_MIXED, "onnx-mixed-int8", "Percentile"), needs=True),
    _onnx(
        "onnx-mixed-dynamic",
        Precision.DYNAMIC_INT8,
        Planned("onnx-mixed-dynamic", onnx_dynamic.mixed_dynamic, {"per_channel": True, "weight_bits": 8}),
        needs=True,
    ),
)


def plan(target: Target, form: ModelFormat = ModelFormat.ONNX) -> list[Recipe]:
    """The recipes of the target's runtime and precisions, in the order of its precisions.

    A runtime that a package brings gets the source as it is: nothing is known here of what else it takes.

    Args:
        target: what for.
        form: the source form that such a runtime gets.
    """
    if target.runtime in set(RuntimeName):
        return _of(RECIPES, target)
    whole = Precision.FP32 in target.precisions
    steps = (Planned("keep", keep.keep),)
    return [Recipe("as-is", target.runtime, Precision.FP32, form, False, steps, (), elsewhere=True)] if whole else []


def forms(target: Target) -> frozenset[ModelFormat]:
    """The source forms that recipes of a target begin with."""
    return frozenset(recipe.source for recipe in (*plan(target), *_of(REPAIRS, target)))


def repairs(target: Target, candidates: Sequence[Candidate], source: Measurements) -> list[Recipe]:
    """Recipes that rescale channels or leave layers in floating point, where the plain ones lost too much accuracy."""
    least: dict[Precision, float] = {}
    for one in candidates:
        if one.measurements is not None:
            lost = _lost(one.measurements, source)
            least[one.precision] = min(lost, least.get(one.precision, lost))
    return [recipe for recipe in _of(REPAIRS, target) if least.get(recipe.precision, 0.0) > _allowed(target)]


def _of(recipes: tuple[Recipe, ...], target: Target) -> list[Recipe]:
    return [
        recipe
        for precision in target.precisions
        for recipe in recipes
        if recipe.runtime == target.runtime and recipe.precision is precision
        if not recipe.compiled_for or recipe.compiled_for in target.providers
        if not recipe.providers or (target.providers or ("cpu",))[0] in recipe.providers
    ]


def _allowed(target: Target) -> float:
    return float("inf") if target.accuracy_drop_points is None else target.accuracy_drop_points


def _lost(measured: Measurements, source: Measurements) -> float:
    """Accuracy lost against the source, in points; where there are no labels, closeness to it stands for accuracy."""
    if measured.accuracy is not None and source.accuracy is not None:
        return (source.accuracy - measured.accuracy) * 100
    return (1 - msgspec.structs.replace(measured, accuracy=None).quality) * 100


def excesses(measured: Measurements, target: Target, source: Measurements) -> dict[str, float]:
    """How far each bounded measurement is beyond its bound, as a share of the bound: only those that are."""
    bounds = (
        ("accuracy", _lost(measured, source), target.accuracy_drop_points),
        ("latency", measured.latency_p95_ms, target.latency_p95_ms),
        ("size", measured.size / 1e6, target.size_mb),
        ("memory", measured.memory_mb, target.memory_mb),
    )
    found = {}
    for name, value, bound in bounds:
        if bound is None:
            continue
        over = float("inf") if value is None else (value - bound) / max(bound, 1e-9)
        if over > 1e-9:
            found[name] = over
    return found


def choose(candidates: Sequence[Candidate], target: Target) -> int | None:
    """The best candidate by the target's objective among those within budgets; else the most accurate one."""
    built = [
        (index, one, one.measurements)
        for index, one in enumerate(candidates)
        if one.measurements is not None and not one.same_as
    ]
    if not built:
        return None
    within = [entry for entry in built if entry[1].within_budgets]
    if not within:
        return max(built, key=lambda entry: (entry[2].quality, entry[2].agreement))[0]
    # What was compiled for the target's accelerator can't be timed here; the others would leave that idle.
    within = [entry for entry in within if entry[1].compiled_for in target.providers] or within
    if target.objective == "latency":
        # What is as fast as the fastest but for noise: the smallest of those, and of equals the truest to the source.
        fastest = min(entry[2].latency_p50_ms for entry in within)
        within = [entry for entry in within if entry[2].latency_p50_ms <= fastest * NOISE]
        smallest = min(entry[2].size for entry in within)
        within = [entry for entry in within if entry[2].size <= smallest * SAME_SIZE]
        return max(within, key=lambda entry: (entry[2].agreement, -entry[2].max_difference, -entry[0]))[0]
    keys: dict[str, Callable[[Measurements], tuple[float, ...]]] = {
        "size": lambda one: (one.size, one.latency_p50_ms),
        "accuracy": lambda one: (-one.quality, one.latency_p50_ms),
    }
    return min(within, key=lambda entry: keys[target.objective](entry[2]))[0]


def fates(candidates: Sequence[Candidate], chosen: int | None, target: Target, source: Measurements) -> list[Candidate]:
    """The candidates, each with a sentence that says what became of it, and whether it is on the Pareto front.

    On the front: no other within budgets is at least as good in accuracy, latency and size, and better in one. The
    picked one is on it too: what another is better by is within what two timings differ by.
    """
    front = {index for index, one in enumerate(candidates) if _on_front(one, candidates)}
    if chosen is not None and candidates[chosen].within_budgets:
        front.add(chosen)
    plain = next((one.measurements for one in candidates if one.precision is Precision.FP32 and one.measurements), None)
    return [
        msgspec.structs.replace(
            one, fate=_fate(index, one, candidates, chosen, target, source, plain), on_front=index in front
        )
        for index, one in enumerate(candidates)
    ]


def _fate(
    index: int,
    one: Candidate,
    candidates: Sequence[Candidate],
    chosen: int | None,
    target: Target,
    source: Measurements,
    plain: Measurements | None,
) -> str:
    measured = one.measurements
    if measured is None:
        twin = next((other.recipe for other in candidates[:index] if other.error == one.error), None)
        return f"not built: as {twin}" if twin else f"not built: {one.error}"
    if one.same_as:
        return f"the same file as {one.same_as}"
    over = excesses(measured, target, source)
    if index == chosen:
        return "picked" if not over else f"picked as the nearest to the budgets; over: {', '.join(over)}"
    if over:
        return "over budget: " + ", ".join(_said(name, measured, target, source) for name in over)
    compiled = candidates[chosen].compiled_for if chosen is not None else ""
    if compiled and not one.compiled_for:
        return f"would leave the {compiled} idle, for which {candidates[chosen or 0].recipe} is compiled"
    if plain is not None and target.objective == "latency" and measured.latency_p50_ms > plain.latency_p50_ms * NOISE:
        return f"slower than fp32: {measured.latency_p50_ms / plain.latency_p50_ms:.2f} times its time"
    if chosen is None or candidates[chosen].measurements is None:
        return "within budgets"
    return _beside(measured, candidates[chosen], target)


def _beside(measured: Measurements, picked: Candidate, target: Target) -> str:
    """Why another one within budgets was picked."""
    best = picked.measurements
    assert best is not None
    if target.objective == "size":
        return f"larger than {picked.recipe}: {measured.size / best.size:.2f} times its size"
    if target.objective == "accuracy":
        return f"less accurate than {picked.recipe}, or as accurate and slower"
    times = measured.latency_p50_ms / best.latency_p50_ms
    if times <= NOISE:
        return f"as fast as {picked.recipe} but for noise, and larger or less true to the source"
    return f"slower than {picked.recipe}: {times:.2f} times its time"


def _said(name: str, measured: Measurements, target: Target, source: Measurements) -> str:
    if name == "accuracy":
        return f"loses {_lost(measured, source):.2f} points of {target.accuracy_drop_points:g} allowed"
    if name == "latency":
        return f"p95 {measured.latency_p95_ms:.3g} ms of {target.latency_p95_ms:g} allowed"
    if name == "size":
        return f"{measured.size / 1e6:.3g} MB of {target.size_mb:g} allowed"
    return f"{measured.memory_mb or 0:.0f} MiB of {target.memory_mb:g} allowed"


def _on_front(one: Candidate, candidates: Sequence[Candidate]) -> bool:
    if one.measurements is None or not one.within_budgets or one.same_as:
        return False
    mine = _merits(one.measurements)
    return not any(
        other is not one
        and other.measurements is not None
        and other.within_budgets
        and not other.same_as
        and all(theirs >= own for theirs, own in zip(_merits(other.measurements), mine, strict=True))
        and _merits(other.measurements) != mine
        for other in candidates
    )


def _merits(measured: Measurements) -> tuple[float, float, float]:
    return measured.quality, -measured.latency_p50_ms, -float(measured.size)
