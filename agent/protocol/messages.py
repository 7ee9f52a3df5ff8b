"""The messages. Times are Unix seconds as the sender's clock tells them; a device's clock may be wrong."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from agent.protocol.delivery import DeliveryPolicy, Waiting
from agent.protocol.errors import WireErrorCode
from agent.protocol.facts import DeviceFacts
from agent.protocol.lifecycle import Phase
from agent.protocol.manifest import DataFile, Encoding, Manifest
from agent.protocol.release import DesiredRelease
from agent.protocol.samples import SampleRequest, SamplesReport, Sampling
from agent.protocol.trace import TraceReport
from agent.protocol.version import ProtocolRange


class OnProviderMissing(StrEnum):
    """What a device does where the execution provider that is wanted first can't run a version that it tries."""

    FALL_BACK = "fall_back"  # the next one runs it, the CPU at last, and that is reported
    REFUSE = "refuse"  # the version fails
    KEEP_OLD = "keep_old"  # it fails where something serves the model; else the next one runs it


class ProbationPolicy(msgspec.Struct, frozen=True):
    """How a version that has just begun to serve is watched, and what takes it back.

    Attributes:
        seconds: how long it is watched.
        minimum_requests: how many requests a judgement of them needs. With fewer in `seconds` the watching goes on, but
            not longer than `at_most_s`.
        at_most_s: when the watching ends whatever came; `seconds` when it is smaller.
        error_share: of its requests may fail, 0 to 1.
        latency_ratio: its 95th percentile may be so many times that of the version before; 0 is no bound.
        memory_mb: what loading and running it may add to the inference worker, in MiB; None is no bound.
        growth_mb: what the worker may grow by without an end while it is watched, in MiB; 0 is no bound.
        load_mb: what loading it is expected to add, in MiB, as it was measured; None where it was not.
        replace_when_short: where memory is too short for two, take the version before out first, and answer nothing
            until the new one is loaded; else the new one fails.
        on_provider_missing: what is done where the first wanted execution provider can't run it.
    """

    seconds: float = 5.0
    minimum_requests: int = 5
    at_most_s: float = 0.0
    error_share: float = 0.2
    latency_ratio: float = 2.0
    memory_mb: float | None = None
    growth_mb: float = 64.0
    load_mb: float | None = None
    replace_when_short: bool = False
    on_provider_missing: OnProviderMissing = OnProviderMissing.FALL_BACK

    @property
    def longest_s(self) -> float:
        """How long the watching may take at most, in seconds."""
        return max(self.seconds, self.at_most_s)


class ExposureMode(StrEnum):
    """How a version runs beside the one that serves."""

    SHADOW = "shadow"  # it is given copies of requests; its answers are compared, and go nowhere
    SPLIT = "split"  # it answers a share of the requests


class Exposure(msgspec.Struct, frozen=True):
    """How far a version is let in while it is tried: it runs beside the version before until the server says more.

    Attributes:
        mode: what it is given.
        share: of the model's requests, 0 to 1. Those with an id are picked by it: a larger share has those of a
            smaller one.
    """

    mode: ExposureMode
    share: float


class DesiredDeployment(msgspec.Struct, frozen=True):
    """One model the device ought to run.

    Attributes:
        deployment_id: the server's id; the same id is the same deployment, however often it is sent.
        manifest: what to run: a `Manifest` as JSON, exactly the bytes that were signed.
        probation_s: how long the new version is watched before it counts as active, in seconds; `probation` says more.
        deadline_s: how long a download may go without a new byte before it fails, in seconds.
        probation: how it is watched; None of a server that says only `probation_s`.
        encodings: ways the artifact may travel other than as it is, the smallest first.
        probation_s: how long the new version is watched before it counts as active, in seconds.
        deadline_s: how long a download may go without a new byte before it fails, in seconds; waiting counts not.
        delivery: how it may come to the device, and when it may begin to serve.
        exposure: how it runs beside the version before, when it is not to take its place yet; None: it serves in full.
            Where nothing serves the model, or the same artifact does, it serves in full all the same.
        traceparent: the span that brings it, where its rollout is traced and it has not settled; else empty.
    """

    deployment_id: str
    manifest: msgspec.Raw
    probation_s: float = 5.0
    deadline_s: float = 86_400.0
    probation: ProbationPolicy | None = None
    encodings: tuple[Encoding, ...] = ()
    delivery: DeliveryPolicy = DeliveryPolicy()
    exposure: Exposure | None = None
    traceparent: str = ""

    def read_manifest(self) -> Manifest:
        """The manifest, of a message that was checked."""
        return msgspec.json.decode(self.manifest, type=Manifest)

    @property
    def policy(self) -> ProbationPolicy:
        """How the new version is watched."""
        return self.probation or ProbationPolicy(seconds=self.probation_s)


class Trial(msgspec.Struct, frozen=True):
    """Candidates that a device is to measure for the gate, beside what it serves; nothing of it ever serves.

    Attributes:
        trial_id: the server's id; the same id is the same trial, however often it is sent.
        candidates: what to measure, in order, each a `Manifest` as JSON, exactly the bytes that were signed. The first
            is the reference: answers of the others are compared with its.
        data: the evaluation set they are measured on.
        timeout_s: how long one candidate may take, in seconds.
        delivery: how its files may come to the device.
    """

    trial_id: str
    candidates: tuple[msgspec.Raw, ...]
    data: DataFile
    timeout_s: float = 600.0
    delivery: DeliveryPolicy = DeliveryPolicy()

    def read_candidates(self) -> tuple[Manifest, ...]:
        """The candidates' manifests, of a message that was checked."""
        return tuple(msgspec.json.decode(one, type=Manifest) for one in self.candidates)


class DesiredState(msgspec.Struct, frozen=True):
    """Everything a device ought to run; retained, and newer revisions replace older ones.

    Attributes:
        protocol: the server's versions.
        fleet: the device's fleet.
        revision: grows by one with every change for this device.
        deployments: one a model. A model that is not listed is to be taken off the device.
        telemetry_interval_s: how often a batch is to be made, in seconds.
        trials: what is to be measured for the gate. A trial that is not listed is to be forgotten.
        sampling: what is to be kept of requests, where the device allows it. What is not listed is to be forgotten.
        sample_requests: what of it is to be sent.
        agent: the release that the agent itself ought to be; None: it stays what it is.
        peers: `host:port` of other devices that name the same LAN and answer requests in its place.
    """

    protocol: ProtocolRange
    fleet: str
    revision: int
    deployments: tuple[DesiredDeployment, ...] = ()
    telemetry_interval_s: float = 10.0
    trials: tuple[Trial, ...] = ()
    sampling: tuple[Sampling, ...] = ()
    sample_requests: tuple[SampleRequest, ...] = ()
    agent: DesiredRelease | None = None
    peers: tuple[str, ...] = ()


class Failure(msgspec.Struct, frozen=True):
    """Why something did not work, with what would mend it."""

    code: WireErrorCode
    detail: str


class ProbationReport(msgspec.Struct, frozen=True):
    """What was seen of a version while it was watched: what the judgement rests on.

    Attributes:
        watched_s: seconds it was watched.
        requests: that it answered, errors included.
        errors: of those, how many failed inside the model or its runtime.
        rejected: refused before the model saw them.
        latency_p95_ms: of its requests; None without any.
        before_p95_ms: of the last requests of the version before it; None where there were too few to compare with.
        memory_mb: what the inference worker grew by since before it was loaded, in MiB; None if unmeasured.
        provider: execution provider that ran it.
        exercised: whether it had as many requests as a judgement needs; else nothing but its time speaks for it.
        note: what people ought to know, such as that it runs on another execution provider than was asked for.
    """

    watched_s: float = 0.0
    requests: int = 0
    errors: int = 0
    rejected: int = 0
    latency_p95_ms: float | None = None
    before_p95_ms: float | None = None
    memory_mb: float | None = None
    provider: str = ""
    exercised: bool = False
    note: str = ""


class DeploymentReport(msgspec.Struct, frozen=True):
    """One deployment as the device sees it.

    Attributes:
        deployment_id: as desired.
        model: its model's name.
        version: its version.
        digest: of its artifact.
        phase: where it is.
        received_bytes: artifact bytes that came over the wire for it, repeats counted.
        missing_chunks: how many chunks are not there yet.
        failure: why it failed or was rolled back; None otherwise.
        attempts: how often it was started, restarts of the agent included.
        probation: what was seen of it while it was watched; None before that.
        encoding: codec of the encoding that it came by; empty when it came as it is, or has not come.
        sources: bytes that each source brought, by its name (`mqtt`, `https`, `peer 10.0.0.7:8472`, …).
        waiting: what it waits for, when it stands still on purpose; None otherwise.
        exposure: how it runs beside the version before, as it is in force; None when it does not.
        loading_s: how long the worker has been loading it, in seconds, where that takes long, as compiling it for an
            accelerator does; else 0.
        trace: when its steps were done, where its rollout is traced; None otherwise.
    """

    deployment_id: str
    model: str
    version: str
    digest: str
    phase: Phase
    received_bytes: int = 0
    missing_chunks: int = 0
    failure: Failure | None = None
    attempts: int = 1
    probation: ProbationReport | None = None
    encoding: str = ""
    sources: dict[str, int] = {}
    waiting: Waiting | None = None
    exposure: Exposure | None = None
    loading_s: float = 0.0
    trace: TraceReport | None = None


class ServingReport(msgspec.Struct, frozen=True):
    """One model that truly answers requests on the device now.

    Attributes:
        model: its name.
        version: its version.
        digest: SHA-256 of the bytes that are loaded.
        deployment_id: that brought it.
        runtime: runtime and version, such as `onnxruntime 1.31.1`.
        provider: the execution provider that really ran, as the runtime's session says.
        load_s: seconds it took to load and warm up.
        fell_back: why no execution provider that was wanted before `provider` runs it; empty when the first does.
    """

    model: str
    version: str
    digest: str
    deployment_id: str
    runtime: str
    provider: str
    load_s: float
    fell_back: str = ""


class TrialResult(msgspec.Struct, frozen=True):
    """What a device measured of one candidate. Latency is of one inference of one row, after warm-up, in ms.

    Attributes:
        digest: of the candidate.
        runtime: runtime and version; empty on failure.
        provider: the execution provider that really ran, as the runtime's session says; empty on failure.
        load_s: seconds to load and warm up.
        latency_p50_ms: median.
        latency_p95_ms: 95th percentile.
        latency_p99_ms: 99th percentile.
        peak_memory_mb: what loading and running it added to a fresh process at most, in MiB; None if unmeasured.
        samples: rows of the evaluation set that were answered.
        accuracy: share of right answers, 0 to 1; None without labels.
        agreement: share of rows answered as the reference did, 0 to 1; None where the reference did not run.
        against_reference: its median time divided by the reference's, both timed in turns, so that a busy moment slows
            both; None of the reference itself, and where it did not run.
        failure: why it could not be measured; None otherwise.
    """

    digest: str
    runtime: str = ""
    provider: str = ""
    load_s: float = 0.0
    latency_p50_ms: float = 0.0
    latency_p95_ms: float = 0.0
    latency_p99_ms: float = 0.0
    peak_memory_mb: float | None = None
    samples: int = 0
    accuracy: float | None = None
    agreement: float | None = None
    failure: Failure | None = None
    against_reference: float | None = None


class TrialPhase(StrEnum):
    """Where a trial is on its device."""

    PENDING = "pending"
    DOWNLOADING = "downloading"
    MEASURING = "measuring"
    DONE = "done"
    FAILED = "failed"


class TrialReport(msgspec.Struct, frozen=True):
    """One trial as the device sees it: its phase, what was measured so far, and why it failed if it did."""

    trial_id: str
    phase: TrialPhase
    results: tuple[TrialResult, ...] = ()
    failure: Failure | None = None


class Problem(msgspec.Struct, frozen=True):
    """Something that went wrong on the device and that it lived through; kept until newer ones take its place.

    Attributes:
        code: stable: see docs/protocol.md. A text, so that an older server takes those it does not know.
        detail: a sentence for people, with what would mend it.
        first_at: when it was first seen, in Unix seconds by the device's clock.
        last_at: when it was last seen.
        count: how often.
        ongoing: it holds still.
    """

    code: str
    detail: str
    first_at: float
    last_at: float
    count: int = 1
    ongoing: bool = False


class Reported(msgspec.Struct, frozen=True):
    """What is true on the device. Sent at connect and at every change; the newest `sequence` of a boot wins.

    Attributes:
        protocol: the agent's versions.
        boot_id: made at each start of the agent.
        sequence: grows within a boot.
        revision: of the desired state last accepted; 0 when none.
        facts: sent whole each time; they are small.
        deployments: all that have not been forgotten.
        serving: what answers requests now.
        sent_at: Unix seconds.
        trials: all that the desired state lists.
        held: digests of artifacts that the device has whole: encodings may build on them.
        problems: the newest things that went wrong on the device itself, at most `LIMITS.problems`.
        releases: deployments of the agent's own releases, `shoal-agent` in the place of a model's name.
    """

    protocol: ProtocolRange
    boot_id: str
    sequence: int
    revision: int
    facts: DeviceFacts
    deployments: tuple[DeploymentReport, ...] = ()
    serving: tuple[ServingReport, ...] = ()
    sent_at: float = 0.0
    trials: tuple[TrialReport, ...] = ()
    held: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    samples: SamplesReport | None = None
    releases: tuple[DeploymentReport, ...] = ()


class Presence(msgspec.Struct, frozen=True):
    """Whether the device is connected; retained, and the will of its connection says offline."""

    online: bool
    boot_id: str


class ChunkRange(msgspec.Struct, frozen=True, array_like=True):
    """Chunks `first` to `last`, both included."""

    first: int
    last: int


class Need(msgspec.Struct, frozen=True):
    """What a device still lacks of an artifact. Sent when a download starts, every few chunks, and when it stalls.

    Attributes:
        digest: of the artifact.
        deployment_id: it is for.
        missing: the lowest missing chunks, as ranges; at most `LIMITS.missing_ranges` of them. Empty: done,
            or waiting for something else than the server.
        window: how many chunks may be in flight to this device; 0: none for now, but do not go on without it.
        alone: it takes no broadcasts: what it lacks is sent to it alone, and nobody waits for it.
        anew: the connection is a new one: nothing of what was sent before will still come.
        rest_s: in how many seconds it will say that it takes more; it is not taken for stalled until then.
    """

    digest: str
    deployment_id: str
    missing: tuple[ChunkRange, ...]
    window: int = 32
    alone: bool = False
    rest_s: float = 0.0
    anew: bool = False


class SourceNeed(msgspec.Struct, frozen=True):
    """A device asks where else than over MQTT it may fetch a content. Answered by a `SourceOffer`."""

    digest: str


class SourceOffer(msgspec.Struct, frozen=True):
    """Where a device may fetch a content over HTTP, with ranges, for a while.

    Attributes:
        digest: as asked.
        url: `https://…`; empty when there is no such place.
        ticket: sent as `Authorization: Bearer …`, to the host of the URL alone; empty for none.
        expires_in_s: after which the ticket is refused, in seconds, and another has to be asked for.
    """

    digest: str
    url: str = ""
    ticket: str = ""
    expires_in_s: float = 0.0


class TrustNeed(msgspec.Struct, frozen=True):
    """A device asks for a piece of a file of TUF metadata. Answered by a `TrustPiece` with the same file and offset.

    Attributes:
        file: its name, as TUF names it: `timestamp.json`, `3.root.json`, …
        offset: where the piece begins, in bytes.
    """

    file: str
    offset: int


class TrustPiece(msgspec.Struct, frozen=True):
    """A piece of a file of TUF metadata.

    Attributes:
        file: as asked.
        offset: as asked.
        total: bytes of the whole file.
        data: at most `LIMITS.trust_piece_bytes`.
        absent: there is no such file.
    """

    file: str
    offset: int
    total: int = 0
    data: bytes = b""
    absent: bool = False


class TensorSketch(msgspec.Struct, frozen=True):
    """How the numbers of a tensor were spread, a row at a time: histograms by bucket of `agent.protocol.sketch`.

    Attributes:
        mean: of each row's mean; the row's number, where a row is one number.
        deviation: of each row's standard deviation; empty where a row is one number.
    """

    mean: dict[int, int] = {}
    deviation: dict[int, int] = {}


class ModelWindow(msgspec.Struct, frozen=True, gc=False):
    """What one loaded artifact did in one telemetry window.

    Confidences, predictions and sketches are of a sample of the rows (`agent.telemetry.sketches`): compare their
    shapes, not their sums.

    Attributes:
        model: its name.
        version: its version.
        digest: of the artifact.
        deployment_id: that brought it.
        provider: execution provider that really ran.
        requests: answered, errors included.
        errors: that failed inside the model or its runtime.
        rejected: refused before the model saw them (bad input, queue full).
        items: rows of all batches.
        latency: histogram of request latency (queueing included) by bucket: `agent.protocol.histogram`.
        confusion: labelled feedback, as `(label, predicted, count)`; class indices.
        confidence: of a classifier, how sure it was of its answers, by bin of `agent.protocol.sketch`.
        predicted: of a classifier, how often it gave each class; the rest of them under -1.
        inputs: sketches of its numeric inputs, by name.
        outputs: sketches of its outputs of one number a row, by name.
        crashes: how often the worker died, or was ended because it hung, while this artifact was served by it, or,
            where another one was being loaded or watched, while it was that one.
        shadowed: of `requests`, how many were copies of what the version that serves answered; `latency` of those is
            without queueing.
        compared: rows of those whose answers were compared.
        disagreed: of those, how many were answered otherwise.
        dropped: requests of which no copy was made though they were picked: more waited than may.
    """

    model: str
    version: str
    digest: str
    deployment_id: str
    provider: str
    requests: int = 0
    errors: int = 0
    rejected: int = 0
    items: int = 0
    latency: dict[int, int] = {}
    confusion: tuple[tuple[int, int, int], ...] = ()
    confidence: dict[int, int] = {}
    predicted: dict[int, int] = {}
    inputs: dict[str, TensorSketch] = {}
    outputs: dict[str, TensorSketch] = {}
    crashes: int = 0
    shadowed: int = 0
    compared: int = 0
    disagreed: int = 0
    dropped: int = 0


class HostWindow(msgspec.Struct, frozen=True, gc=False):
    """The device itself at the end of a telemetry window; None where it can't be measured.

    Attributes:
        cpu_percent: of all cores, over the window.
        memory_used_mb: of the whole device, in MiB.
        agent_rss_mb: resident memory of supervisor and worker together, in MiB.
        temperature_c: hottest sensor, in degrees Celsius.
        disk_free_mb: on the state directory, in MiB.
    """

    cpu_percent: float | None = None
    memory_used_mb: float | None = None
    agent_rss_mb: float | None = None
    temperature_c: float | None = None
    disk_free_mb: float | None = None


class TelemetryBatch(msgspec.Struct, frozen=True, gc=False):
    """One telemetry window, kept on the device's disk until the server says it is stored.

    Attributes:
        protocol: the agent's versions.
        spool_id: names the spool; a new one is made when the spool is lost, so that sequences may start again.
        sequence: grows by one with each batch of a spool; (device, spool, sequence) is stored once.
        started_at: Unix seconds, by the device's clock.
        ended_at: Unix seconds, by the device's clock.
        models: what each loaded artifact did.
        host: the device itself.
    """

    protocol: ProtocolRange
    spool_id: str
    sequence: int
    started_at: float
    ended_at: float
    models: tuple[ModelWindow, ...] = ()
    host: HostWindow = HostWindow()


class TelemetryAck(msgspec.Struct, frozen=True):
    """The server has stored the batches `sequences` of a spool; the device may forget them."""

    spool_id: str
    sequences: tuple[int, ...]


class Renew(msgspec.Struct, frozen=True):
    """A device asks for a certificate for its next key, before the present one expires.

    Attributes:
        protocol: the agent's versions.
        csr: signing request (PKCS #10) of the next key, as PEM.
        signature: over the bytes of `csr`, by the present key (ECDSA or RSA PKCS #1 v1.5 with SHA-256, or Ed25519).
    """

    protocol: ProtocolRange
    csr: str
    signature: bytes


class Certificate(msgspec.Struct, frozen=True):
    """The answer to `Renew`. Times are Unix seconds.

    Attributes:
        key_sha256: of the public key (SubjectPublicKeyInfo) that was asked for.
        certificate: with its chain, as PEM; empty on failure.
        ca: what the broker's certificate is checked against from then on, as PEM; empty on failure.
        not_before: valid from.
        not_after: valid until.
        failure: why there is none; None otherwise.
    """

    key_sha256: str
    certificate: str = ""
    ca: str = ""
    not_before: float = 0.0
    not_after: float = 0.0
    failure: Failure | None = None
