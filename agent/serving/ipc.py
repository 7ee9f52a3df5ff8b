"""What the supervisor and the inference worker say to each other, over a pair of connected Unix sockets.

Frames are a 4-byte big-endian length and a MessagePack body. The worker is the supervisor's child: it is told what to
load and serve, and asked what it did. Either side treats an ended stream as the other's death.
"""

from __future__ import annotations

import msgspec

from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import Manifest
from agent.protocol.messages import Exposure, ModelWindow
from agent.protocol.samples import Sampling
from agent.samples.sample import Sample
from agent.serving.ensemble_config import EnsembleConfig
from agent.telemetry.figures import SupervisorFigures

FRAME_LIMIT = 16 * 1024 * 1024


class Lend(msgspec.Struct, frozen=True):
    """What a worker is told first, with the sockets that it is to serve on. They listen, and stay the supervisor's too.

    Attributes:
        grpc: addresses at which gRPC is to be served; empty for nowhere.
        log_format: of its log, `text` or `json`.
        device: the device's id, for the log.
        for_peers: how many of the sockets, the last ones, are for peers of the LAN; they accept nobody before
            `TellPeers`.
    """

    grpc: tuple[str, ...] = ()
    log_format: str = "text"
    device: str = ""
    for_peers: int = 0


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Load an artifact beside what is served, and warm it up. Answered by `Loaded` with the same `request_id`.

    Attributes:
        request_id: names the answer.
        deployment_id: that brings it.
        manifest: of the artifact.
        path: of its file.
        golden_path: of its golden inputs, which it must answer as it did where it was built; empty for none.
        need_mb: free memory without which it is not loaded, in MiB.
        compiled: a folder in which what a provider compiles of it may be kept; empty for none.
        may_fall_back: whether another execution provider than the first that the manifest wants will do.
        serve: whether it answers as soon as it is loaded, where nothing else of its model does. It may be activated
            all the same.
    """

    request_id: int
    deployment_id: str
    manifest: Manifest
    path: str
    golden_path: str = ""
    need_mb: float = 0.0
    may_fall_back: bool = True
    compiled: str = ""
    serve: bool = False


class Activate(msgspec.Struct, frozen=True, tag="activate"):
    """Let a loaded artifact answer the model's requests from now on. Requests begun on the old one end on it.

    The old one stays loaded until `Unload`, so that going back is a pointer swap. Answered by `Activated`.
    """

    request_id: int
    model: str
    digest: str


class Expose(msgspec.Struct, frozen=True, tag="expose"):
    """Let a loaded artifact run beside what serves its model, until it is activated or unloaded. Answered by `Exposed`.

    Attributes:
        request_id: names the answer.
        model: the model's name.
        digest: of the artifact.
        exposure: what it is given, and how much of it.
    """

    request_id: int
    model: str
    digest: str
    exposure: Exposure


class Unload(msgspec.Struct, frozen=True, tag="unload"):
    """Forget an artifact once its last request has been answered; a model without a serving artifact answers 404."""

    model: str
    digest: str


class Collect(msgspec.Struct, frozen=True, tag="collect"):
    """Give the counts since the last time and start new ones. Answered by `Window`."""

    request_id: int


class Peek(msgspec.Struct, frozen=True, tag="peek"):
    """Say what every artifact did since it was loaded; no window begins or ends. Answered by `Peeked`."""

    request_id: int


class Expect(msgspec.Struct, frozen=True, tag="expect"):
    """Which models ought to be served here: while none serves them, clients are told to come again.

    The first one lets the worker take requests.
    """

    models: tuple[str, ...]


class Declare(msgspec.Struct, frozen=True, tag="declare"):
    """Answer for these ensembles, and no others. Answered by `Unservable`."""

    ensembles: tuple[EnsembleConfig, ...]


class ChooseSamples(msgspec.Struct, frozen=True, tag="choose-samples"):
    """Which rows may be kept, of these models alone: none of others, and none at first."""

    models: tuple[Sampling, ...]


class TellFigures(msgspec.Struct, frozen=True, tag="tell-figures"):
    """What the supervisor says of itself, for whoever asked the local API."""

    figures: SupervisorFigures


class PeerTrust(msgspec.Struct, frozen=True):
    """How peers are known, and this device is to them: by mutual TLS.

    Attributes:
        chain: path of a PEM file with this device's key and its certificate.
        certificate: SHA-256 of that, which changes when it is renewed.
        ca: PEM of the fleet's CA, which alone is believed.
        fleet: that a peer's certificate has to name.
    """

    chain: str
    certificate: str
    ca: str
    fleet: str


class TellPeers(msgspec.Struct, frozen=True, tag="tell-peers"):
    """Which devices of the LAN may be asked in this one's place, and may ask it; said again whenever that changes.

    Attributes:
        peers: `host:port` of those that may be asked; none where nothing is forwarded.
        serve: whether requests of peers are answered, where sockets for them were lent.
        trust: how peers are known; None for plain HTTP.
        devices: whose requests are answered; empty for every device of the fleet.
        tries: how many peers are asked for one request.
        any_variant: whether a peer may answer with another variant of the same version.
    """

    peers: tuple[str, ...] = ()
    serve: bool = False
    trust: PeerTrust | None = None
    devices: tuple[str, ...] = ()
    tries: int = 2
    any_variant: bool = False


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Answer what has begun, then end."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The worker is there. It takes requests when it is told what to `Expect`.

    Attributes:
        url: of the local inference API, such as `http://127.0.0.1:8470`.
        unix_path: of its Unix socket; empty when there is none.
    """

    url: str
    unix_path: str = ""


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """How a load went.

    Attributes:
        request_id: of the `Load`.
        runtime: runtime and version; empty on failure.
        provider: execution provider that really ran the warm-up; empty on failure.
        load_s: seconds to load, warm up, and answer golden inputs.
        before_mb: the worker's resident memory before, in MiB; None where it can't be measured.
        code: why it failed; None when it did not.
        detail: a sentence with the remedy, on failure.
        fell_back: why no provider that was wanted before `provider` runs it; empty when the first wanted does.
    """

    request_id: int
    runtime: str = ""
    provider: str = ""
    load_s: float = 0.0
    before_mb: float | None = None
    code: WireErrorCode | None = None
    detail: str = ""
    fell_back: str = ""


class Activated(msgspec.Struct, frozen=True, tag="activated"):
    """Whether the swap was made: `ok` is false when that artifact is not loaded."""

    request_id: int
    ok: bool


class Exposed(msgspec.Struct, frozen=True, tag="exposed"):
    """Whether it runs beside: `ok` is false when it is not loaded, or nothing serves."""

    request_id: int
    ok: bool


class Unservable(msgspec.Struct, frozen=True, tag="unservable"):
    """What keeps declared ensembles from being served, by name; told again whenever that changes."""

    ensembles: dict[str, str]


class GrpcServed(msgspec.Struct, frozen=True, tag="grpc"):
    """The gRPC form of the local inference API listens, or why it can't; said once, after the first `Expect`.

    Attributes:
        address: where it listens; empty when it does not.
        problem: a sentence with the remedy; empty when it does.
    """

    address: str = ""
    problem: str = ""


class Window(msgspec.Struct, frozen=True, tag="window"):
    """What each artifact did since the last `Collect`, and the worker's resident memory in MiB."""

    request_id: int
    models: tuple[ModelWindow, ...]
    rss_mb: float


class AskFigures(msgspec.Struct, frozen=True, tag="ask-figures"):
    """Somebody asks the local API how the agent is. Answered by `TellFigures`."""


class Sampled(msgspec.Struct, frozen=True, tag="sampled"):
    """Rows of one artifact that were chosen since the last `Collect`; said before its `Window`, where there are any."""

    samples: tuple[Sample, ...]


class Logged(msgspec.Struct, frozen=True, tag="logged"):
    """One record of the worker's log, as it also is on standard error.

    Attributes:
        at: in Unix seconds.
        level: its name.
        logger: who logged it.
        text: without secrets.
    """

    at: float
    level: str
    logger: str
    text: str


class Counts(msgspec.Struct, frozen=True):
    """What one artifact did since it was loaded.

    Attributes:
        deployment_id: that brought it.
        requests: answered, errors included.
        errors: that failed inside the model or its runtime.
        rejected: refused before the model saw them.
        latency: of all requests, by bucket: `agent.protocol.histogram`.
        recent: likewise, of the last few hundred requests.
        oldest_s: how long the request has waited that has waited longest, in seconds; 0 when none waits.
        running_s: how long the inference has been going on that goes on now, in seconds; 0 when none does.
    """

    deployment_id: str
    requests: int = 0
    errors: int = 0
    rejected: int = 0
    latency: dict[int, int] = {}
    recent: dict[int, int] = {}
    oldest_s: float = 0.0
    running_s: float = 0.0


class Peeked(msgspec.Struct, frozen=True, tag="peeked"):
    """What artifacts did since they were loaded, and the worker's resident memory in MiB."""

    request_id: int
    models: tuple[Counts, ...]
    rss_mb: float


ToWorker = (
    Declare
    | Expect
    | Load
    | Activate
    | Expose
    | Unload
    | Collect
    | Peek
    | ChooseSamples
    | TellFigures
    | TellPeers
    | Shutdown
)
FromWorker = (
    Ready | Loaded | Activated | Exposed | Unservable | GrpcServed | Window | Peeked | AskFigures | Sampled | Logged
)
