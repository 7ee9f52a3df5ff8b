"""The agent's configuration: a TOML file, overridden by `SHOAL_AGENT_*` variables; frozen, read once."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import tomllib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.addresses import check_place, check_unix_path
from agent.balancing_config import BalancingConfig, read_balancing
from agent.commands.config import CommandConfig, read_commands
from agent.errors import ConfigError
from agent.files import write_durably
from agent.grpc_config import GrpcConfig, read_grpc
from agent.identity import identity_folder, load_identity
from agent.inferences import InferenceConfig, read_inference
from agent.pipelines.config import PipelineConfig
from agent.pipelines.reading import read_pipelines
from agent.protocol.brokers import read_brokers
from agent.protocol.delivery import LinkType, read_budgets, read_rate
from agent.protocol.limits import LIMITS
from agent.protocol.logs import FORMS
from agent.protocol.manifest import RUNTIME_NAME
from agent.protocol.topics import check_device_id
from agent.samples.collecting import SampleConfig
from agent.serving.ensemble_config import EnsembleConfig, read_ensembles
from agent.source_config import TABLES, SourceConfig, read_sources
from agent.update.pace import OwnLimits
from agent.update.zones import zone_of

PREFIX = "SHOAL_AGENT_"
KEYS = (
    "device_id",
    "state_dir",
    "broker",
    "listen",
    "unix_socket",
    "tags",
    "runtimes",
    "log_level",
    "log_format",
    "ca_file",
    "cert_file",
    "key_file",
    "key",
    "root_file",
    "expired_grace_s",
    *TABLES,
    "pipelines",
    "ensembles",
    "disk_floor_mb",
    "store_keep_mb",
    "time_zone",
    "link",
    "hang_s",
    "samples",
    "grpc",
    "commands",
    "inference",
    "self_update",
    "balancing",
)
SAMPLES_KEYS = ("allow", "max_mb")
LINK_KEYS = ("type", "metered", "rate", "budgets")
LONGEST_GRACE_S = 30 * 86_400.0
LONGEST_HANG_S = 86_400.0
MOST_MB = 1 << 30


@dataclass(frozen=True)
class Config:
    """Everything that can be set.

    Attributes:
        device_id: this device's name in the fleet.
        state_dir: artifacts, journal, spool.
        broker: `mqtt://[user:password@]host:port` or `mqtts://…`, of a cluster several by commas in the order in which
            they are tried; what enrolling gave when absent.
        listen: `host:port` of the local inference API.
        unix_socket: path of its Unix socket; empty for none.
        tags: what this device says of itself, for profiles to match.
        runtimes: the only ones to use; empty for all that import.
        log_level: DEBUG, INFO, WARNING or ERROR.
        log_format: `text` for people, or `json`.
        ca_file: certificates that the broker's is checked against; empty for those that enrolling gave, or for the
            system's.
        cert_file: the device's certificate chain (PEM), where it was not got by enrolling.
        key_file: its key (PEM).
        key: `pkcs11:` URI (RFC 7512) of the key to enrol with; a file in state_dir when absent.
        root_file: TUF root metadata that this device trusts; empty to trust what a broker on this machine sends first.
        time_zone: where the device is, such as Europe/Berlin; the system's when empty.
        link_type: `ethernet`, `wifi` or `cellular`; found out when empty.
        link_metered: whether the link costs by the byte; None: cellular does.
        own_limits: bytes a second, and budgets by kind of link, of artifacts.
        expired_grace_s: how long metadata still counts after it has expired, in seconds, for bad clocks.
        sources: where contents come from besides the broker.
        disk_floor_mb: MiB that a download must leave free on the disk of state_dir.
        store_keep_mb: MiB of artifacts that served earlier that may stay, beside the one that serves and the one
            before it: to go back to without a download, and for deltas.
        hang_s: how long one inference may take, in seconds, before the process that runs models is taken to hang and is
            started again; 0: for ever.
        grpc: whether and where the local inference API is served by gRPC too.
        pipelines: what the agent itself reads, asks its models about, and publishes.
        ensembles: graphs of models that are asked as one.
        samples: whether rows that models were asked may be kept here, and sent when the server asks. Never by default.
        commands: which commands of the server are carried out here.
        inference: whether the server may ask this device's models.
        self_update: whether the agent may become another release of itself; not where a package manager, or who runs a
            container, brings its versions.
        balancing: whether devices of a LAN answer requests in each other's place.
    """

    device_id: str
    state_dir: Path
    broker: str = "mqtt://127.0.0.1:7471"
    listen: str = "127.0.0.1:8470"
    unix_socket: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    runtimes: tuple[str, ...] = ()
    log_level: str = "INFO"
    log_format: str = "text"
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    key: str = ""
    root_file: str = ""
    expired_grace_s: float = 0.0
    sources: SourceConfig = field(default_factory=SourceConfig)
    disk_floor_mb: float = 64.0
    store_keep_mb: float = 512.0
    time_zone: str = ""
    link_type: str = ""
    link_metered: bool | None = None
    own_limits: OwnLimits = field(default_factory=OwnLimits)
    hang_s: float = 120.0
    grpc: GrpcConfig = field(default_factory=GrpcConfig)
    pipelines: tuple[PipelineConfig, ...] = ()
    ensembles: tuple[EnsembleConfig, ...] = ()
    samples: SampleConfig = field(default_factory=SampleConfig)
    commands: CommandConfig = field(default_factory=CommandConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    self_update: bool = True
    balancing: BalancingConfig = field(default_factory=BalancingConfig)

    @property
    def broker_is_local(self) -> bool:
        """Whether the broker is on this machine, whichever of its addresses is taken."""
        return all(_is_loopback(host) for host, _ in read_brokers(self.broker).places)

    @property
    def broker_has_tls(self) -> bool:
        """Whether the broker is spoken to by TLS."""
        return read_brokers(self.broker).tls


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load_config(path: Path | None, environment: Mapping[str, str]) -> Config:
    """Read the configuration.

    Args:
        path: of the TOML file; None for variables only.
        environment: such as `os.environ`.

    Raises:
        ConfigError: naming the key and the remedy.
    """
    values = _file(path) if path else {}
    for key in KEYS:
        if PREFIX + key.upper() in environment:
            values[key] = _from_text(key, environment[PREFIX + key.upper()])
    unknown = sorted(set(values) - set(KEYS))
    if unknown:
        raise ConfigError(f"{unknown[0]}: there is no such key; there are {', '.join(KEYS)}")
    state_dir = Path(_text(values, "state_dir", "") or "/var/lib/shoal-agent")
    identity = load_identity(identity_folder(state_dir))
    try:
        given = _text(values, "device_id", "")
        device_id = check_device_id(given or (identity.device_id if identity else kept_device_id(state_dir)))
    except ValueError as error:
        raise ConfigError(f"device_id: {error}") from None
    except OSError as error:
        detail = error.strerror or error
        raise ConfigError(f"state_dir: {state_dir} can't be written ({detail}): name a folder that can") from None
    if identity is not None and identity.device_id != device_id:
        raise ConfigError(
            f"device_id: {device_id!r} is not the {identity.device_id!r} that is enrolled in {state_dir}: leave it "
            "out, or name another state_dir"
        )
    cert_file, key_file = (_pem_file(key, _text(values, key, "")) for key in ("cert_file", "key_file"))
    if bool(cert_file) != bool(key_file):
        raise ConfigError("cert_file and key_file go together: give both, or enrol (shoal-agent enroll)")
    default_broker = (identity.broker if identity else "") or Config.broker
    return Config(
        device_id=device_id,
        state_dir=state_dir,
        broker=_brokers(_text(values, "broker", default_broker)),
        listen=check_place("listen", _text(values, "listen", Config.listen)),
        unix_socket=check_unix_path("unix_socket", _text(values, "unix_socket", "")),
        tags=_tags(values.get("tags", {})),
        runtimes=_runtimes(values.get("runtimes", [])),
        log_level=_level(_text(values, "log_level", "INFO")),
        log_format=_log_format(_text(values, "log_format", "text")),
        ca_file=_pem_file("ca_file", _text(values, "ca_file", "")),
        cert_file=cert_file,
        key_file=key_file,
        key=_token_key(_text(values, "key", "")),
        root_file=_root_file(_text(values, "root_file", "")),
        expired_grace_s=_grace(values.get("expired_grace_s", 0.0)),
        sources=read_sources(values),
        disk_floor_mb=_megabytes(values, "disk_floor_mb", Config.disk_floor_mb),
        store_keep_mb=_megabytes(values, "store_keep_mb", Config.store_keep_mb),
        time_zone=_time_zone(_text(values, "time_zone", "")),
        hang_s=_hang(values.get("hang_s", Config.hang_s)),
        grpc=read_grpc(values.get("grpc", {})),
        pipelines=_pipelines(values),
        ensembles=read_ensembles(values.get("ensembles", [])),
        samples=_samples(values.get("samples", {})),
        commands=read_commands(values.get("commands", {})),
        inference=read_inference(values.get("inference", {})),
        self_update=_on_or_off("self_update", _text(values, "self_update", "on")),
        balancing=read_balancing(values.get("balancing", {})),
        **_link(values.get("link", {})),
    )


def _pipelines(values: Mapping[str, Any]) -> tuple[PipelineConfig, ...]:
    found = read_pipelines(values.get("pipelines", []))
    if found and not values.get("unix_socket") and str(values.get("listen", "")).endswith(":0"):
        raise ConfigError(
            "pipelines: with `listen` at port 0 they don't know where to ask: name a port, or unix_socket"
        )
    return found


def kept_device_id(state_dir: Path) -> str:
    """The id this device gave itself: made once from the machine's id (hashed, as that is meant to stay private)."""
    path = state_dir / "device-id"
    kept = path.read_text(errors="replace").strip() if path.exists() else ""
    if kept:
        return kept
    seed = machine_id(Path("/etc/machine-id")) or uuid.uuid4().hex
    device_id = "dev-" + hashlib.sha256(f"shoal:{seed}:{state_dir}".encode()).hexdigest()[:12]
    state_dir.mkdir(parents=True, exist_ok=True)
    write_durably(path, f"{device_id}\n".encode(), mode=0o644)
    return device_id


def machine_id(path: Path) -> str:
    """The text of /etc/machine-id; empty where there is none yet: images are shipped with an empty one, or a word."""
    try:
        text = path.read_text(errors="replace").strip()
    except OSError:
        return ""
    return text if len(text) >= 32 else ""


def _file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"--config: {path} can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {path} is not TOML: {error}") from None


def _from_text(key: str, text: str) -> Any:
    if key == "tags":
        pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
        for name, sign, _ in pairs:
            if not sign or not name.strip():
                raise ConfigError(f"tags: {name.strip()[:80]!r} is not name=value, such as site=plant7,line=3")
        return {name.strip(): value.strip() for name, _, value in pairs}
    if key in {*TABLES, "samples", "grpc", "commands", "inference", "balancing"}:
        try:
            return tomllib.loads(f"table = {text}")["table"]
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{key}: {text[:80]!r} is no inline table, such as {{ serve = true }}: {error}") from None
    if key in {"pipelines", "ensembles"}:
        try:
            return tomllib.loads(f"tables = {text}")["tables"]
        except tomllib.TOMLDecodeError:  # it is not repeated: it may hold passwords
            raise ConfigError(f"{key}: is no TOML array of inline tables: [{{ name = … }}]") from None
    if key == "link":
        try:
            return tomllib.loads(f"link = {text}")["link"]
        except tomllib.TOMLDecodeError:
            raise ConfigError('link: is not a TOML table such as { type = "cellular", metered = true }') from None
    return [part.strip() for part in text.split(",") if part.strip()] if key == "runtimes" else text


def _text(values: Mapping[str, Any], key: str, default: str) -> str:
    value = values.get(key, default)
    if not isinstance(value, str):
        raise ConfigError(f"{key}: must be text in quotes")
    return value


def _brokers(value: str) -> str:
    try:
        read_brokers(value)
    except ValueError as error:
        raise ConfigError(f"broker: {error}, such as mqtt://10.0.0.5:1883") from None
    return value


def _pem_file(key: str, value: str) -> str:
    if value and not os.access(value, os.R_OK):
        raise ConfigError(f"{key}: {value!r} can't be read: name a PEM file, or leave it out")
    return value


def _token_key(value: str) -> str:
    if value and not value.startswith("pkcs11:"):
        raise ConfigError("key: it is no pkcs11: URI, such as pkcs11:token=T;object=O?module-path=/usr/lib/….so")
    return value


def _root_file(value: str) -> str:
    if value and not os.access(value, os.R_OK):
        raise ConfigError(f"root_file: {value!r} can't be read: save one with `shoal trust root`, or leave it empty")
    return value


def _grace(value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if isinstance(value, bool) or not 0 <= seconds <= LONGEST_GRACE_S:
        raise ConfigError(f"expired_grace_s: {value!r} is not a number of seconds from 0 to {LONGEST_GRACE_S:.0f}")
    return seconds


def _hang(value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if isinstance(value, bool) or not (seconds == 0 or 1 <= seconds <= LONGEST_HANG_S):
        raise ConfigError(f"hang_s: {value!r} is not 0, nor a number of seconds from 1 to {LONGEST_HANG_S:.0f}")
    return seconds


def _megabytes(values: Mapping[str, Any], key: str, default: float) -> float:
    value = values.get(key, default)
    try:
        amount = float(value)
    except (TypeError, ValueError):
        amount = -1.0
    if isinstance(value, bool) or not 0 <= amount <= MOST_MB:
        raise ConfigError(f"{key}: {value!r} is not a number of MiB from 0 to {MOST_MB}")
    return amount


def _time_zone(value: str) -> str:
    try:
        zone_of(value)
    except LookupError:
        raise ConfigError(
            f"time_zone: {value[:64]!r} is not known here, such as Europe/Berlin; tzdata has them"
        ) from None
    return value


def _link(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not set(value) <= set(LINK_KEYS):
        raise ConfigError(f'link: must be a table with {", ".join(LINK_KEYS)}, such as {{ type = "cellular" }}')
    kind, metered = value.get("type", ""), value.get("metered")
    if kind not in {"", *(one.value for one in LinkType)}:
        raise ConfigError(f"link.type: {kind!r} is not one of {', '.join(one.value for one in LinkType)}")
    if metered is not None and not isinstance(metered, bool):
        raise ConfigError("link.metered: must be true or false")
    rate, budgets = value.get("rate", ""), value.get("budgets", {})
    texts = isinstance(budgets, dict) and all(isinstance(one, str) for one in budgets.values())
    if not isinstance(rate, str) or not texts:
        raise ConfigError(
            'link: rate and budgets are texts, such as rate = "1 MB/s", budgets.cellular = "50 MB per day"'
        )
    try:
        own = OwnLimits(read_rate(rate) if rate else 0, read_budgets(budgets))
    except ValueError as error:
        raise ConfigError(f"link: {error}") from None
    return {"link_type": kind, "link_metered": metered, "own_limits": own}


def _samples(value: Any) -> SampleConfig:
    if not isinstance(value, dict) or not set(value) <= set(SAMPLES_KEYS):
        raise ConfigError(f"samples: must be a table with {', '.join(SAMPLES_KEYS)}, such as {{ allow = true }}")
    allow = value.get("allow", SampleConfig.allow)
    if not isinstance(allow, bool):
        raise ConfigError("samples.allow: must be true or false")
    named = {f"samples.{key}": one for key, one in value.items()}
    return SampleConfig(allow, _megabytes(named, "samples.max_mb", SampleConfig.max_mb))


def _tags(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
        raise ConfigError('tags: must be a table of texts, such as { site = "plant7" }')
    if len(value) > LIMITS.facts_entries or any(
        len(text) > LIMITS.name_chars for pair in value.items() for text in pair
    ):
        raise ConfigError(
            f"tags: at most {LIMITS.facts_entries}, of {LIMITS.name_chars} characters: the server takes no more"
        )
    return {str(key): str(one) for key, one in value.items()}


def _runtimes(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(RUNTIME_NAME.match(str(one)) for one in value):
        raise ConfigError('runtimes: must be a list of runtimes\' names, such as "onnx" and "litert"')
    return tuple(map(str, value))


def _level(value: str) -> str:
    if value.upper() not in {"DEBUG", "INFO", "WARNING", "ERROR"}:
        raise ConfigError(f"log_level: {value!r} is not DEBUG, INFO, WARNING or ERROR")
    return value.upper()


def _on_or_off(key: str, value: str) -> bool:
    if value not in {"on", "off"}:
        raise ConfigError(f"{key}: {value[:40]!r} is not on or off")
    return value == "on"


def _log_format(value: str) -> str:
    if value not in FORMS:
        raise ConfigError(f"log_format: {value!r} is not text or json")
    return value
