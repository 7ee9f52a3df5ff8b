"""Encoding and decoding of messages: JSON, but MessagePack for telemetry, trust, samples and parts of inferences.

Bounds are checked before decoding.

Unknown fields are ignored, so that a newer peer can say more; a wrong type, a missing field, too many bytes, too many
entries or too deep a nesting is refused with a `WireError`, and nothing else escapes from here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import msgspec

from agent.protocol.commands import Command, CommandAnswer, problem_of
from agent.protocol.delivery import BUDGETED, DAY_MINUTES, DeliveryPolicy, Waiting
from agent.protocol.errors import WireError, WireErrorCode
from agent.protocol.facts import DeviceFacts
from agent.protocol.limits import LIMITS
from agent.protocol.manifest import RUNTIME_NAME, Encoding, Manifest, Scheduling
from agent.protocol.messages import (
    Certificate,
    DeploymentReport,
    DesiredState,
    Exposure,
    ModelWindow,
    Need,
    Presence,
    ProbationPolicy,
    ProbationReport,
    Problem,
    Renew,
    Reported,
    SourceNeed,
    SourceOffer,
    TelemetryAck,
    TelemetryBatch,
    TrialReport,
    TrustNeed,
    TrustPiece,
)
from agent.protocol.parts import Hop, InferPart, PartAnswer
from agent.protocol.release import DesiredRelease, ReleaseManifest, info_problem, read_manifest
from agent.protocol.samples import SampleAck, SamplePiece, SamplesReport
from agent.protocol.sketch import CONFIDENCE_BINS, LARGEST, NO_NUMBER, NOT_FINITE, OTHERS
from agent.protocol.topics import DEVICE_ID, DIGEST, TRUST_FILE
from agent.protocol.trace import MARK, MARKS, TRACEPARENT_CHARS, TraceReport
from agent.protocol.version import ProtocolRange, check_peer

Message = (
    DesiredState
    | Reported
    | Presence
    | Need
    | TelemetryBatch
    | TelemetryAck
    | Renew
    | Certificate
    | TrustNeed
    | TrustPiece
    | SourceNeed
    | SourceOffer
    | SamplePiece
    | SampleAck
    | Command
    | CommandAnswer
    | InferPart
    | PartAnswer
)
MessageT = TypeVar(
    "MessageT",
    DesiredState,
    Reported,
    Presence,
    Need,
    TelemetryBatch,
    TelemetryAck,
    Renew,
    Certificate,
    TrustNeed,
    TrustPiece,
    SourceNeed,
    SourceOffer,
    SamplePiece,
    SampleAck,
    Command,
    CommandAnswer,
    InferPart,
    PartAnswer,
)

_PLAIN = (
    *(DesiredState, Reported, Presence, Need, Renew, Certificate, SourceNeed, SourceOffer),
    *(Command, CommandAnswer),
)
_PACKED = (TelemetryBatch, TelemetryAck, TrustNeed, TrustPiece, SamplePiece, SampleAck, InferPart, PartAnswer)
_DECODERS: dict[type, Any] = {
    **{kind: msgspec.json.Decoder(kind) for kind in _PLAIN},
    **{kind: msgspec.msgpack.Decoder(kind) for kind in _PACKED},
}


def encode(message: Message) -> bytes:
    """The bytes of a message, in the format of its topic."""
    if isinstance(message, _PACKED):
        return msgspec.msgpack.encode(message)
    return msgspec.json.encode(message)


def decode(payload: bytes, kind: type[MessageT]) -> MessageT:
    """Read a message of a known kind.

    Raises:
        WireError: `too_large`, `malformed` or `protocol_mismatch`; never anything else, whatever the bytes.
    """
    if len(payload) > LIMITS.message_bytes:
        raise WireError(
            WireErrorCode.TOO_LARGE,
            f"{kind.__name__} has {len(payload)} bytes, at most {LIMITS.message_bytes} are read",
        )
    try:
        message: MessageT = _DECODERS[kind].decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(WireErrorCode.MALFORMED, f"{kind.__name__}: {str(error)[:300]}") from None
    _check(message)
    return message


def _check(message: Message) -> None:
    protocol: ProtocolRange | None = getattr(message, "protocol", None)
    if protocol is not None:
        check_peer(protocol, peer_name="fleet server" if isinstance(message, DesiredState) else "agent")
    match message:
        case DesiredState():
            _bound(message.deployments, LIMITS.deployments, "deployments")
            _check_desired(message)
        case Reported():
            _check_report(message)
        case Need():
            _check_need(message)
        case TelemetryBatch():
            _check_batch(message)
        case TelemetryAck():
            _require(all(0 <= one < LIMITS.total for one in message.sequences), "sequences holds an impossible number")
        case Renew() | Certificate():
            _check_renewal(message)
        case TrustNeed() | TrustPiece():
            _check_trust(message)
        case _:
            _check_more(message)


def _check_more(message: Message) -> None:
    if isinstance(message, SourceNeed | SourceOffer):
        _check_source(message)
    elif isinstance(message, InferPart | PartAnswer):
        _check_part(message)
    elif isinstance(message, Command | CommandAnswer):
        problem = problem_of(message)
        _require(not problem, problem)
    elif isinstance(message, SamplePiece | SampleAck):
        _check_upload(message)


def _check_part(message: InferPart | PartAnswer) -> None:
    _require(DEVICE_ID.match(message.part_id) is not None, "part_id is not an id")
    _require(0 <= message.attempt < LIMITS.counter, "attempt is out of bounds")
    _bound(message.body, LIMITS.part_bytes, "body")
    _require(0 <= message.header_length <= len(message.body), "header_length is out of bounds")
    _bound(message.route, LIMITS.hops, "route")
    for hop in message.route:
        _check_hop(hop)
    if isinstance(message, InferPart):
        _check_asked_model("", message.model, message.version)
        _require(0 < message.deadline_ms <= LIMITS.total, "deadline_ms is out of bounds")
        return
    _require(100 <= message.status <= 599, "status is none of HTTP")
    _bound(message.error, LIMITS.detail_chars, "error")
    _bound(message.hops, LIMITS.hops, "hops")
    times = (message.retry_after_s, message.queue_s, message.infer_s, *message.hops)
    _require(all(0 <= one <= LIMITS.seconds for one in times), "a time is out of bounds")
    _require(0 <= message.waiting < LIMITS.counter, "waiting is out of bounds")


def _check_hop(hop: Hop) -> None:
    _require(DEVICE_ID.match(hop.device) is not None, "route.device is not a device id")
    _check_asked_model("route.", hop.model, hop.version)
    _bound(hop.address or "", LIMITS.name_chars, "route.address")
    _require(_visible(hop.address or ""), "route.address holds what no address may")


def _check_asked_model(where: str, model: str, version: str | None) -> None:
    _names(**{f"{where}model": model})
    if version is not None:
        _names(**{f"{where}version": version})


def _check_renewal(message: Renew | Certificate) -> None:
    if isinstance(message, Renew):
        _bound(message.csr, LIMITS.csr_chars, "csr")
        _bound(message.signature, LIMITS.signature_bytes, "signature")
        return
    _require(DIGEST.match(message.key_sha256) is not None, "key_sha256 is not a SHA-256 digest")
    _bound(message.certificate, LIMITS.certificate_chars, "certificate")
    _bound(message.ca, LIMITS.certificate_chars, "ca")
    moments = (message.not_before, message.not_after)
    _require(all(0 <= one <= LIMITS.unix_seconds for one in moments), "not_before or not_after is out of bounds")


def _check_need(message: Need) -> None:
    _require(DIGEST.match(message.digest) is not None, "digest is not a SHA-256 digest")
    _bound(message.missing, LIMITS.missing_ranges, "missing")
    _require(0 <= message.window <= 4096, "window must be between 0 and 4096")
    _require(0 <= message.rest_s <= LIMITS.rest_s, "rest_s is out of bounds")
    for span in message.missing:
        _require(0 <= span.first <= span.last < 1 << 24, "missing holds an impossible range")


def _check_trust(message: TrustNeed | TrustPiece) -> None:
    _require(TRUST_FILE.match(message.file) is not None, "file is not the name of a metadata file")
    if isinstance(message, TrustNeed):
        _require(0 <= message.offset < LIMITS.trust_file_bytes, "offset is out of bounds")
        return
    _bound(message.data, LIMITS.trust_piece_bytes, "data")
    _require(0 <= message.total <= LIMITS.trust_file_bytes, "total is out of bounds")
    _require(0 <= message.offset <= message.total - len(message.data), "data goes beyond the file's end")


def _check_source(message: SourceNeed | SourceOffer) -> None:
    _require(DIGEST.match(message.digest) is not None, "digest is not a SHA-256 digest")
    if isinstance(message, SourceNeed):
        return
    _bound(message.url, LIMITS.url_chars, "url")
    _bound(message.ticket, LIMITS.ticket_chars, "ticket")
    _require(message.url == "" or message.url.startswith(("https://", "http://")), "url is none of HTTP")
    _require(_visible(message.url) and _visible(message.ticket), "url or ticket holds what no header may")
    _require(0 <= message.expires_in_s <= LIMITS.seconds, "expires_in_s is out of bounds")


def _check_upload(message: SamplePiece | SampleAck) -> None:
    _require(DEVICE_ID.match(message.upload_id) is not None, "upload_id is not an id")
    _require(DIGEST.match(message.digest) is not None, "digest is not a SHA-256 digest")
    if isinstance(message, SampleAck):
        _require(0 <= message.received <= LIMITS.sample_file_bytes, "received is out of bounds")
        _bound(message.refused, LIMITS.detail_chars, "refused")
        return
    _bound(message.data, LIMITS.sample_piece_bytes, "data")
    _require(0 < message.size <= LIMITS.sample_file_bytes, "size is out of bounds")
    _require(message.data != b"" and 0 <= message.offset <= message.size - len(message.data), "data is out of bounds")


def _check_sampling(message: DesiredState) -> None:
    _bound(message.sampling, LIMITS.sampling, "sampling")
    for one in message.sampling:
        _names(**{"sampling.model": one.model})
        _require(0 < one.samples <= LIMITS.samples, "sampling.samples is out of bounds")
        _require(0 < one.bytes <= LIMITS.sampled_bytes, "sampling.bytes is out of bounds")
        _require(0 < one.sample_bytes <= LIMITS.sample_bytes, "sampling.sample_bytes is out of bounds")
        _require(0 < one.days <= LIMITS.sample_days, "sampling.days is out of bounds")
        _require(0 < one.below <= 1, "sampling.below is not between 0 and 1")
    models = {one.model for one in message.sampling}
    _require(len(models) == len(message.sampling), "sampling holds a model twice")
    _bound(message.sample_requests, LIMITS.sample_requests, "sample_requests")
    for request in message.sample_requests:
        _require(DEVICE_ID.match(request.upload_id) is not None, "upload_id is not an id")
        _names(**{"sample_requests.model": request.model})
        _require(0 < request.samples <= LIMITS.samples, "sample_requests.samples is out of bounds")
        _require(0 < request.bytes <= LIMITS.sample_file_bytes, "sample_requests.bytes is out of bounds")
        _check_delivery(request.delivery)


def _check_samples(report: SamplesReport) -> None:
    _bound(report.models, LIMITS.sampling, "samples.models")
    for model in report.models:
        _names(**{"samples.models": model})
    _counts(LIMITS.total, kept=report.kept, bytes=report.bytes)
    _bound(report.uploads, LIMITS.sample_requests, "samples.uploads")
    for one in report.uploads:
        _names(upload_id=one.upload_id, reason=one.reason)
        _counts(LIMITS.total, samples=one.samples, bytes=one.bytes, sent_bytes=one.sent_bytes)
        _bound(one.detail, LIMITS.detail_chars, "samples.uploads.detail")
        _require("\0" not in one.detail, "samples.uploads.detail holds a NUL character")
        if one.waiting is not None:
            _check_waiting(one.waiting)


def _visible(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


def _check_desired(message: DesiredState) -> None:
    _counts(LIMITS.counter, revision=message.revision)
    shortest = LIMITS.shortest_interval_s
    _require(shortest <= message.telemetry_interval_s <= LIMITS.seconds, "telemetry_interval_s is out of bounds")
    models = set()
    for deployment in message.deployments:
        _require(DEVICE_ID.match(deployment.deployment_id) is not None, "deployment_id is not an id")
        _require(0 <= deployment.probation_s <= LIMITS.seconds, "probation_s is out of bounds")
        _require(0 < deployment.deadline_s <= LIMITS.seconds, "deadline_s is out of bounds")
        _check_policy(deployment.policy)
        _check_delivery(deployment.delivery)
        _check_exposure(deployment.exposure)
        _bound(deployment.traceparent, TRACEPARENT_CHARS, "traceparent")
        models.add(_read_manifest(deployment.manifest).model)
        _bound(deployment.encodings, LIMITS.encodings, "encodings")
        for encoding in deployment.encodings:
            _check_encoding(encoding)
    _check_sampling(message)
    _bound(message.peers, LIMITS.peers, "peers")
    for peer in message.peers:
        _names(peers=peer)
    _bound(message.trials, LIMITS.trials, "trials")
    for trial in message.trials:
        _require(DEVICE_ID.match(trial.trial_id) is not None, "trial_id is not an id")
        _require(0 < trial.timeout_s <= LIMITS.seconds, "timeout_s is out of bounds")
        _require(0 < len(trial.candidates) <= LIMITS.trial_candidates, "candidates is empty or too long")
        _require(DIGEST.match(trial.data.digest) is not None, "data.digest is not a SHA-256 digest")
        _require(0 < trial.data.size <= LIMITS.artifact_bytes, "data.size is out of bounds")
        _require(0 < trial.data.chunk_size <= LIMITS.chunk_bytes, "data.chunk_size is out of bounds")
        _check_delivery(trial.delivery)
        for manifest in trial.candidates:
            _read_manifest(manifest)
    if message.agent is not None:
        _check_release(message.agent)
    ids = {deployment.deployment_id for deployment in message.deployments}
    _require(len(ids) == len(message.deployments), "deployments names an id twice")
    _require(len(models) == len(message.deployments), "deployments holds a model twice: one a model")


def _check_release(wanted: DesiredRelease) -> None:
    _require(DEVICE_ID.match(wanted.deployment_id) is not None, "agent.deployment_id is not an id")
    _require(1 <= wanted.confirm_s <= LIMITS.confirm_s, "agent.confirm_s is out of bounds")
    _require(1 <= wanted.most_starts <= LIMITS.starts, "agent.most_starts is out of bounds")
    _require(0 < wanted.deadline_s <= LIMITS.seconds, "agent.deadline_s is out of bounds")
    _check_delivery(wanted.delivery)
    _bound(wanted.encodings, LIMITS.encodings, "agent.encodings")
    for encoding in wanted.encodings:
        _check_encoding(encoding)
    try:
        manifest = read_manifest(bytes(wanted.manifest))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(WireErrorCode.MALFORMED, f"agent.manifest: {str(error)[:300]}") from None
    if manifest is not None:
        check_release(manifest)


def check_release(manifest: ReleaseManifest) -> ReleaseManifest:
    """Return a release's manifest unchanged when its numbers and names are possible.

    Raises:
        WireError: `malformed`, naming the field.
    """
    _require(DIGEST.match(manifest.digest) is not None, "agent.manifest.digest is not a SHA-256 digest")
    _require(0 < manifest.size <= LIMITS.release_bytes, "agent.manifest.size is out of bounds")
    _require(0 < manifest.chunk_size <= LIMITS.chunk_bytes, "agent.manifest.chunk_size is out of bounds")
    problem = info_problem(manifest.info)
    _require(not problem, f"agent.manifest.info.{problem}")
    return manifest


def _check_policy(policy: ProbationPolicy) -> None:
    _counts(LIMITS.counter, minimum_requests=policy.minimum_requests)
    memory = (policy.growth_mb, policy.memory_mb or 0.0, policy.load_mb or 0.0)
    numbers = (policy.seconds, policy.at_most_s, policy.latency_ratio, *memory)
    _require(all(0 <= one <= LIMITS.seconds for one in numbers), "probation holds a number that is out of bounds")
    _require(0 <= policy.error_share <= 1, "probation.error_share is not between 0 and 1")


def _check_exposure(exposure: Exposure | None) -> None:
    _require(exposure is None or 0 <= exposure.share <= 1, "exposure.share is not between 0 and 1")


def _check_encoding(encoding: Encoding) -> None:
    _names(codec=encoding.codec)
    _require(DIGEST.match(encoding.digest) is not None, "encodings.digest is not a SHA-256 digest")
    _require(not encoding.base or DIGEST.match(encoding.base) is not None, "encodings.base is not a SHA-256 digest")
    _require(0 < encoding.size <= LIMITS.artifact_bytes, "encodings.size is out of bounds")
    _require(0 < encoding.chunk_size <= LIMITS.chunk_bytes, "encodings.chunk_size is out of bounds")


def _check_delivery(policy: DeliveryPolicy) -> None:
    _counts(LIMITS.total, rate=policy.rate)
    _require(set(policy.budgets) <= set(BUDGETED), "delivery.budgets names a kind of link that there is not")
    for budgets in policy.budgets.values():
        _bound(budgets, LIMITS.budgets, "delivery.budgets")
        _counts(LIMITS.total, **{"delivery.budgets": max((one.bytes for one in budgets), default=0)})
        _require(all(one.bytes >= 0 for one in budgets), "delivery.budgets holds a negative number")
    for windows in (policy.download, policy.activate):
        _bound(windows, LIMITS.windows, "delivery windows")
        for window in windows:
            _bound(window.days, 7, "delivery window's days")
            _require(all(0 <= day < 7 for day in window.days), "a delivery window has an impossible day")
            times = 0 <= window.start < DAY_MINUTES and 0 <= window.end <= DAY_MINUTES
            _require(times and window.start != window.end, "a delivery window has impossible times")
            _require(len(window.zone) <= LIMITS.name_chars, "a delivery window's zone is too long")


def _check_waiting(waiting: Waiting) -> None:
    _bound(waiting.detail, LIMITS.detail_chars, "waiting.detail")
    _require("\0" not in waiting.detail, "waiting.detail holds a NUL character")
    _require(0 <= (waiting.until or 0) <= LIMITS.unix_seconds, "waiting.until is out of bounds")


def _read_manifest(raw: msgspec.Raw) -> Manifest:
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(WireErrorCode.MALFORMED, f"manifest: {str(error)[:300]}") from None
    return check_manifest(manifest)


def check_manifest(manifest: Manifest) -> Manifest:
    """Return the manifest unchanged when its numbers and names are possible.

    Raises:
        WireError: `malformed`, naming the field.
    """
    _require(DIGEST.match(manifest.digest) is not None, "manifest.digest is not a SHA-256 digest")
    _require(0 < manifest.size <= LIMITS.artifact_bytes, "manifest.size is out of bounds")
    _require(0 < manifest.chunk_size <= LIMITS.chunk_bytes, "manifest.chunk_size is out of bounds")
    _require(0 < len(manifest.model) <= LIMITS.name_chars, "manifest.model is empty or too long")
    _require(0 < len(manifest.version) <= LIMITS.name_chars, "manifest.version is empty or too long")
    _require(RUNTIME_NAME.match(manifest.runtime) is not None, "manifest.runtime is no runtime's name")
    if manifest.golden is not None:
        _require(DIGEST.match(manifest.golden.digest) is not None, "manifest.golden.digest is not a SHA-256 digest")
        _require(0 < manifest.golden.size <= LIMITS.golden_bytes, "manifest.golden.size is out of bounds")
        _require(0 < manifest.golden.chunk_size <= LIMITS.chunk_bytes, "manifest.golden.chunk_size is out of bounds")
    _require(1 <= manifest.threads <= 1024, "manifest.threads is out of bounds")
    _require(1 <= manifest.max_batch <= 4096, "manifest.max_batch is out of bounds")
    _check_scheduling(manifest.scheduling)
    for side, tensors in (("inputs", manifest.inputs), ("outputs", manifest.outputs)):
        _require(0 < len(tensors) <= LIMITS.tensors, f"manifest.{side} is empty or too long")
        for tensor in tensors:
            _require(len(tensor.shape) <= LIMITS.tensor_rank, f"manifest.{side}: rank of {tensor.name[:80]!r}")
            _require(
                all(-1 <= size < 1 << 31 for size in tensor.shape)
                and math.prod(max(size, 1) for size in tensor.shape) <= LIMITS.tensor_elements,
                f"manifest.{side}: shape of {tensor.name[:80]!r}",
            )
            example = tensor.example_shape or ()
            _require(
                len(example) <= LIMITS.tensor_rank
                and all(0 < size < 1 << 31 for size in example)
                and math.prod(example) <= LIMITS.example_elements,
                f"manifest.{side}: example_shape of {tensor.name[:80]!r}",
            )
    return manifest


def _check_scheduling(scheduling: Scheduling) -> None:
    name = "manifest.scheduling"
    _require(1 <= scheduling.queue_limit <= LIMITS.waiting_requests, f"{name}.queue_limit is out of bounds")
    for field in ("latency_target_ms", "batch_wait_ms"):
        _require(0 <= getattr(scheduling, field) <= LIMITS.scheduling_ms, f"{name}.{field} is out of bounds")
    _require(
        len(scheduling.cores) <= LIMITS.cores and all(0 <= core < LIMITS.cores for core in scheduling.cores),
        f"{name}.cores is out of bounds",
    )
    _require(0 <= scheduling.gpu_memory_mb <= LIMITS.gpu_memory_mb, f"{name}.gpu_memory_mb is out of bounds")


def _check_report(message: Reported) -> None:
    _bound(message.deployments, LIMITS.deployments * 4, "deployments")
    _bound(message.serving, LIMITS.deployments, "serving")
    _names(boot_id=message.boot_id)
    _counts(LIMITS.counter, sequence=message.sequence, revision=message.revision)
    for one in message.serving:
        _bound(one.fell_back, LIMITS.detail_chars, "serving.fell_back")
        _require("\0" not in one.fell_back, "serving.fell_back holds a NUL character")
    _bound(message.releases, LIMITS.releases, "releases")
    for report in (*message.deployments, *message.releases):
        _check_deployment(report)
    _bound(message.held, LIMITS.held, "held")
    _require(all(DIGEST.match(one) for one in message.held), "held holds what is no SHA-256 digest")
    _bound(message.trials, LIMITS.trials, "trials")
    for trial in message.trials:
        _check_trial(trial)
    _bound(message.problems, LIMITS.problems, "problems")
    for problem in message.problems:
        _check_problem(problem)
    if message.samples is not None:
        _check_samples(message.samples)
    _check_facts(message.facts)


def _check_deployment(report: DeploymentReport) -> None:
    _names(deployment_id=report.deployment_id, encoding=report.encoding)
    _counts(LIMITS.counter, missing_chunks=report.missing_chunks, attempts=report.attempts)
    _counts(LIMITS.total, received_bytes=report.received_bytes)
    if report.probation is not None:
        _check_probation(report.probation)
    _bound(report.sources, LIMITS.sources, "sources")
    for name, count in report.sources.items():
        _names(source=name)
        _counts(LIMITS.total, source=count)
    if report.waiting is not None:
        _check_waiting(report.waiting)
    _check_exposure(report.exposure)
    _require(0 <= report.loading_s <= LIMITS.seconds, "loading_s is out of bounds")
    if report.trace is not None:
        _check_trace(report.trace)


def _check_trace(trace: TraceReport) -> None:
    _bound(trace.traceparent, TRACEPARENT_CHARS, "trace.traceparent")
    _bound(trace.marks, MARKS, "trace.marks")
    _require(all(MARK.fullmatch(one.name) for one in trace.marks), "trace.marks holds an impossible name")
    _require(all(math.isfinite(one.ago_s) for one in trace.marks), "trace.marks holds an impossible time")


def _check_probation(seen: ProbationReport) -> None:
    _counts(LIMITS.total, requests=seen.requests, errors=seen.errors, rejected=seen.rejected)
    numbers = (seen.watched_s, seen.latency_p95_ms or 0.0, seen.before_p95_ms or 0.0)
    _require(all(0 <= one <= LIMITS.seconds for one in numbers), "probation holds a number that is out of bounds")
    _require(abs(seen.memory_mb or 0.0) <= LIMITS.seconds, "probation.memory_mb is out of bounds")
    _names(provider=seen.provider)
    _bound(seen.note, LIMITS.detail_chars, "probation.note")
    _require("\0" not in seen.note, "probation.note holds a NUL character")


def _check_problem(problem: Problem) -> None:
    _names(code=problem.code)
    _bound(problem.detail, LIMITS.detail_chars, "problems.detail")
    _require("\0" not in problem.detail, "problems.detail holds a NUL character")
    _counts(LIMITS.counter, count=problem.count)
    moments = (problem.first_at, problem.last_at)
    _require(all(0 <= one <= LIMITS.unix_seconds for one in moments), "first_at or last_at is out of bounds")


def _check_trial(trial: TrialReport) -> None:
    _names(trial_id=trial.trial_id)
    _bound(trial.results, LIMITS.trial_candidates, "results")
    for one in trial.results:
        _require(DIGEST.match(one.digest) is not None, "results.digest is not a SHA-256 digest")
        _names(runtime=one.runtime, provider=one.provider)
        _counts(LIMITS.counter, samples=one.samples)
        shares = [value for value in (one.accuracy, one.agreement) if value is not None]
        _require(all(0 <= value <= 1 for value in shares), "a share is not between 0 and 1")
        numbers = [one.load_s, one.latency_p50_ms, one.latency_p95_ms, one.latency_p99_ms, one.peak_memory_mb or 0.0]
        _require(all(0 <= value <= LIMITS.seconds for value in numbers), "a measurement is out of bounds")


def _check_batch(message: TelemetryBatch) -> None:
    _bound(message.models, LIMITS.models_per_batch, "models")
    _names(spool_id=message.spool_id)
    _counts(LIMITS.total, sequence=message.sequence)
    for model in message.models:
        _names(
            model=model.model,
            version=model.version,
            digest=model.digest,
            deployment_id=model.deployment_id,
            provider=model.provider,
        )
        _counts(
            LIMITS.total,
            requests=model.requests,
            errors=model.errors,
            rejected=model.rejected,
            items=model.items,
        )
        _bound(model.latency, LIMITS.histogram_buckets, "latency")
        _bound(model.confusion, LIMITS.confusion_cells, "confusion")
        fits = _all_within(model.latency, 0, LIMITS.histogram_buckets - 1)
        fits = fits and _all_within(model.latency.values(), 0, LIMITS.total - 1)
        _require(fits, "latency holds an impossible bucket")
        _require(
            all(min(cell) >= 0 and max(cell) < LIMITS.total for cell in model.confusion),
            "confusion holds a negative number",
        )
        _check_signals(model)


def _check_signals(model: ModelWindow) -> None:
    _counts(
        LIMITS.total,
        crashes=model.crashes,
        shadowed=model.shadowed,
        compared=model.compared,
        disagreed=model.disagreed,
        dropped=model.dropped,
    )
    _check_cells(model.confidence, "confidence", NO_NUMBER, CONFIDENCE_BINS - 1, CONFIDENCE_BINS + 1)
    _check_cells(model.predicted, "predicted", OTHERS, LIMITS.total - 1, LIMITS.predicted_classes)
    for side, sketches in (("inputs", model.inputs), ("outputs", model.outputs)):
        _bound(sketches, LIMITS.sketched_tensors, side)
        for name, sketch in sketches.items():
            _names(**{side: name})
            for cells in (sketch.mean, sketch.deviation):
                _check_cells(cells, side, -LARGEST, NOT_FINITE, LIMITS.sketch_cells)


def _check_cells(cells: Mapping[int, int], field: str, first: int, last: int, limit: int) -> None:
    if not cells:
        return
    _bound(cells, limit, field)
    if not (_all_within(cells, first, last) and _all_within(cells.values(), 0, LIMITS.total - 1)):
        raise WireError(WireErrorCode.MALFORMED, f"{field} holds an impossible cell")


def _all_within(numbers: Collection[int], first: int, last: int) -> bool:
    return not numbers or (min(numbers) >= first and max(numbers) <= last)


def _check_facts(facts: DeviceFacts) -> None:
    for field in ("cpu_features", "accelerators", "runtimes", "tags", "features", "commands"):
        _bound(getattr(facts, field), LIMITS.facts_entries, f"facts.{field}")
    for feature in (*facts.features, *facts.commands):
        _names(**{"facts.features or facts.commands": feature})
    _names(inference_address=facts.inference_address)
    agent = facts.agent
    _names(platform=agent.platform, self_update=agent.self_update, release=agent.release, installed=agent.installed)
    _counts(LIMITS.counter, launcher=agent.launcher)
    _names(balancing_address=facts.balancing_address, balancing_lan=facts.balancing_lan)
    _names(**{"link.type": facts.link.type, "link.interface": facts.link.interface})
    for key, value in facts.tags.items():
        _require(
            len(key) <= LIMITS.name_chars and len(value) <= LIMITS.name_chars,
            f"facts.tags: {key[:40]!r} or its value is too long",
        )


def _names(**texts: str) -> None:
    """Short, and without the NUL that no database holds."""
    most = LIMITS.name_chars
    for field, text in texts.items():
        if len(text) > most or "\0" in text:
            raise WireError(WireErrorCode.MALFORMED, f"{field} is too long, or holds a NUL character")


def _counts(limit: int, **numbers: int) -> None:
    for field, number in numbers.items():
        if not 0 <= number < limit:
            raise WireError(WireErrorCode.MALFORMED, f"{field} is negative or impossibly large")


def _bound(values: Collection[object], limit: int, field: str) -> None:
    if len(values) > limit:
        raise WireError(WireErrorCode.TOO_LARGE, f"{field} has {len(values)} entries, at most {limit} are read")


def _require(holds: bool, message: str) -> None:  # noqa: FBT001
    if not holds:
        raise WireError(WireErrorCode.MALFORMED, message)
