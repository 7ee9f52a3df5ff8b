"""`GET /metrics` of the local API: what the worker counts, and what the supervisor says of itself when it is asked.

Nothing is done for it while nobody asks. Counts begin anew when an artifact is loaded, and when the worker starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from agent import __version__
from agent.protocol.histogram import bucket_value
from agent.serving.models import LoadedModel
from agent.serving.registry import Registry
from agent.telemetry.exposition import Family, Labels, exposition
from agent.telemetry.figures import SupervisorFigures
from agent.telemetry.host import own_memory_mb

if TYPE_CHECKING:  # at run time only where requests are forwarded
    from agent.serving.balancing.lan import Lan

LATENCY_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
BATCH_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
MIB = 2**20


def metrics_text(registry: Registry, supervisor: SupervisorFigures | None, lan: Lan | None) -> bytes:
    """Everything, as Prometheus reads it; without the supervisor's part where it did not answer."""
    return exposition([*_of_worker(registry), *_of_lan(registry, lan), *_of_supervisor(supervisor)])


def _of_worker(registry: Registry) -> Iterator[Family]:
    loaded = registry.all()
    memory = Family("shoal_agent_worker_resident_bytes", "gauge", "Resident memory of the process that runs models.")
    yield memory.add(own_memory_mb() * MIB)
    serving = Family(
        "shoal_agent_model_serving",
        "gauge",
        "Whether a loaded artifact answers its model's requests (1) or is beside (0).",
    )
    requests = Family(
        "shoal_agent_inference_requests_total", "counter", "Requests that were answered, errors included."
    )
    errors = Family(
        "shoal_agent_inference_errors_total", "counter", "Requests that failed in the model or its runtime."
    )
    rejected = Family("shoal_agent_inference_rejected_total", "counter", "Requests that were refused before the model.")
    waiting = Family("shoal_agent_queue_requests", "gauge", "Requests that wait for the model.")
    latency = Family("shoal_agent_inference_duration_seconds", "histogram", "How long requests took, waiting included.")
    batches = Family("shoal_agent_batch_rows", "histogram", "Rows that the model was run with at once.")
    for one in loaded:
        labels, counts = _labels(one), one.totals()
        serves = registry.serving(one.manifest.model) is one
        serving.add(serves, {**labels, "runtime": one.runtime.version, "provider": one.runtime.provider})
        requests.add(counts.requests, labels)
        errors.add(counts.errors, labels)
        rejected.add(counts.rejected, labels)
        waiting.add(one.waiting, labels)
        seconds: dict[float, int] = {bucket_value(bucket): count for bucket, count in counts.latency.items()}
        latency.add_histogram(LATENCY_S, seconds, sum(value * count for value, count in seconds.items()), labels)
        rows, total = one.statistics.batches()
        batches.add_histogram(BATCH_ROWS, rows, total, labels)
    yield from (serving, requests, errors, rejected, waiting, latency, batches)
    swaps = Family(
        "shoal_agent_model_swaps_total", "counter", "How often another artifact began to answer for a model."
    )
    for model, count in registry.swaps().items():
        swaps.add(count, {"model": model})
    yield swaps


def _of_lan(registry: Registry, lan: Lan | None) -> Iterator[Family]:
    if lan is None:
        return
    given, taken = lan.forwarding, lan.api
    yield Family("shoal_agent_peers", "gauge", "Devices of the LAN that may be asked in this one's place.").add(
        given.peers
    )
    unanswered = Family("shoal_agent_forwards_unanswered_total", "counter", "Peers that were asked and did not answer.")
    for reason in ("full", "absent", "failed"):
        unanswered.add(given.unanswered[reason], {"reason": reason})
    yield unanswered
    forwarded = Family(
        "shoal_agent_forwarded_requests_total", "counter", "Requests that a peer answered: they count there, not here."
    )
    answered = Family(
        "shoal_agent_peer_requests_total",
        "counter",
        "Requests of peers; those that were answered are among this device's, those refused are not.",
    )
    for one in registry.all():
        labels, digest = _labels(one), one.manifest.digest
        forwarded.add(given.answered[digest], labels)
        answered.add(taken.answered[digest], {**labels, "outcome": "answered"})
        answered.add(taken.refused[digest], {**labels, "outcome": "refused"})
    yield from (forwarded, answered)


def _labels(loaded: LoadedModel) -> Labels:
    manifest = loaded.manifest
    return {"model": manifest.model, "version": manifest.version, "artifact": manifest.digest[:12]}


def _of_supervisor(said: SupervisorFigures | None) -> Iterator[Family]:
    if said is None:
        return
    yield Family("shoal_agent_info", "gauge", "Always 1; its labels say which device, and which agent.").add(
        1, {"device": said.device_id, "version": __version__}
    )
    for name, kind, meaning, value in (
        ("shoal_agent_broker_connected", "gauge", "Whether the broker has accepted the connection.", said.connected),
        ("shoal_agent_spool_batches", "gauge", "Telemetry that the server has not acknowledged.", said.spooled),
        ("shoal_agent_spool_bytes", "gauge", "What that takes on the disk.", said.spooled_bytes),
        ("shoal_agent_spool_dropped_total", "counter", "Telemetry that was thrown away.", said.spool_dropped),
        ("shoal_agent_workers_ended_total", "counter", "Workers that ended unasked.", said.workers_ended),
        ("shoal_agent_problems", "gauge", "Problems of the device that are told to the server.", said.problems),
        ("shoal_agent_supervisor_resident_bytes", "gauge", "Resident memory of the supervisor.", said.rss_mb * MIB),
    ):  # fmt: skip
        yield Family(name, kind, meaning).add(value)
    phases = Family("shoal_agent_deployment_phase", "gauge", "Always 1; its labels say where a deployment is.")
    for one in said.deployments:
        phases.add(1, {"deployment": one.deployment_id, "model": one.model, "version": one.version, "phase": one.phase})
    yield phases
