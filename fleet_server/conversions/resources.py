"""What a build needs of a Dask worker, and what a machine has: pure. Amounts are as Dask counts them.

Every worker of Shoal has `SHOAL`: 1, and every build takes it, so a worker runs one build at a time: two would spoil
each other's measurements. A GPU is `GPU`: 1, and `compute_capability_8.7`: 1 where a TensorRT engine must be made on
its own kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from agent.protocol.facts import DeviceFacts
from fleet_server.conversions.executor import Resources
from fleet_server.devices.schemas import ProfileSpec

BUILDER: Resources = {"SHOAL": 1}
GPU = "GPU"
CAPABILITY = "compute_capability_"
CAPABILITY_FACT = "accelerators.compute_capability"
GPU_PROVIDERS = frozenset({"cuda", "tensorrt"})


def needs_of(spec: ProfileSpec) -> tuple[Resources, ...]:
    """What a profile's builds need: what it says itself, else what its providers and match imply.

    Several compute capabilities in the match are alternatives, in its order.
    """
    if spec.resources is not None:
        return ({**BUILDER, **spec.resources},)
    if not GPU_PROVIDERS & set(spec.providers):
        return (dict(BUILDER),)
    plain = {**BUILDER, GPU: 1.0}
    stated = spec.match.get(CAPABILITY_FACT)
    if "tensorrt" not in spec.providers or not isinstance(stated, str | list):
        return (plain,)
    capabilities = [stated] if isinstance(stated, str) else [str(one) for one in stated]
    return tuple({**plain, f"{CAPABILITY}{one}": 1.0} for one in capabilities) or (plain,)


def first_met(needs: tuple[Resources, ...], workers: Iterable[Resources]) -> Resources | None:
    """The first alternative that one of the workers has, busy or not; None when no worker has any."""
    present = list(workers)
    return next((one for one in needs or (dict(BUILDER),) if any(_has(worker, one) for worker in present)), None)


def missing(needs: tuple[Resources, ...], workers: Iterable[Resources]) -> str:
    """A sentence about what no worker has, with what would help."""
    present = [worker for worker in workers if _has(worker, BUILDER)]
    if not present:
        return "no worker: start one with `shoal worker`"
    lacking = [", ".join(f"{name}={one[name]:g}" for name in _lacked(one, present)) for one in needs]
    return f"no worker of {len(present)} has {' or '.join(lacking)}: start `shoal worker` on a machine that has"


def measured_resources(facts: DeviceFacts) -> Resources:
    """What a machine's worker offers, by its facts: GPUs and their capabilities; architecture and CPU features as 1."""
    gpus = [one for one in facts.accelerators if one.kind == "cuda"]
    capabilities = Counter(f"{CAPABILITY}{one.compute_capability}" for one in gpus if one.compute_capability)
    kinds = Counter(one.kind for one in facts.accelerators if one.kind != "cuda")
    found: Resources = {**BUILDER, f"arch_{facts.arch}": 1, **{f"cpu_{name}": 1 for name in facts.cpu_features}}
    found |= {name: float(count) for name, count in (*capabilities.items(), *kinds.items())}
    return {**found, GPU: float(len(gpus))} if gpus else found


def _has(worker: Resources, needed: Resources) -> bool:
    return all(worker.get(name, 0) >= amount for name, amount in needed.items())


def _lacked(needed: Resources, workers: list[Resources]) -> list[str]:
    """The names that no worker has enough of; all but the builder's where each is there, but not together."""
    alone = [name for name, amount in needed.items() if not any(_has(worker, {name: amount}) for worker in workers)]
    return alone or [name for name in needed if name not in BUILDER]
