"""Settings of the fleet server: frozen, read once at the edge from `SHOAL_*` variables and command-line options."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from agent.protocol.brokers import read_brokers
from fleet_server.addresses import is_loopback
from fleet_server.openid import check_url

DEFAULT_API_PORT = 7470
DEFAULT_BROKER_PORT = 7471
DASK_JOBS = 16
EVERY_FLEET = "*"  # in SHOAL_OIDC_ROLES
MetricsAccess = Literal["loopback", "token", "open", "off"]


def find_onnx2tf_python(told: Path | None) -> Path | None:
    """The interpreter that was named, or that of `.venv-onnx2tf` beside this environment when it is there."""
    if told is not None:
        return told
    beside = Path(sys.prefix).parent / ".venv-onnx2tf" / "bin" / "python"
    return beside if beside.exists() else None


def check_dask_address(value: str) -> str:
    """The host of a Dask scheduler's address.

    Raises:
        ValueError: when it is not one.
    """
    try:
        parts = urlsplit(value)
        usable = parts.scheme in {"tcp", "tls"} and parts.port and parts.path in {"", "/"}
    except ValueError:
        usable = False
    if not usable or not parts.hostname:
        raise ValueError("it is not tcp://host:8786 or tls://host:8786")
    return parts.hostname


def check_dask_tls(scheduler: str | None, files: Mapping[str, Path | None]) -> None:
    """Certificates and address of a Dask cluster fit: `tls://` with all the files, which are there, or none.

    Raises:
        ValueError: naming the file that lacks.
    """
    given = {name: path for name, path in files.items() if path is not None}
    if scheduler is None or not scheduler.startswith("tls://"):
        if given:
            raise ValueError(
                f"{', '.join(given)} serve a tls:// address of the Dask scheduler: give one, or leave it out"
            )
        return
    absent = [name for name in files if name not in given]
    if absent:
        raise ValueError(f"dask_scheduler: tls:// needs {', '.join(absent)}")
    for name, path in given.items():
        if not path.is_file():
            raise ValueError(f"{name}: there is no file {path}")


class Settings(BaseSettings):
    """Everything that can be set; every field has a working default."""

    model_config = SettingsConfigDict(env_prefix="SHOAL_", frozen=True, extra="ignore")

    state_dir: Path = Field(Path("/var/lib/shoal"), description="Folder for database, artifacts and working files.")
    host: str = Field("127.0.0.1", description="Address the REST API listens on.")
    port: int = Field(DEFAULT_API_PORT, ge=0, le=65535, description="Port of the REST API.")
    admin_token: SecretStr | None = Field(
        None,
        min_length=8,
        description="The server-wide admin's bearer token; needed beyond loopback. When absent, one is made at the "
        "first start and kept in the file `admin-token` of the state folder.",
    )
    idempotency_hours: float = Field(
        24.0, gt=0, le=24 * 30, description="How long the answer to a POST with an Idempotency-Key is kept, in hours."
    )
    session_hours: float = Field(12.0, gt=0, le=24 * 30, description="How long a login holds, in hours.")
    oidc_issuer: str | None = Field(
        None,
        description="https:// address of an OpenID provider, as its tokens have it in `iss`: people may log in there.",
    )
    oidc_client_id: str | None = Field(None, description="The client id that this server has there: the audience.")
    oidc_claim: str = Field("groups", min_length=1, description="The claim whose values give roles.")
    oidc_roles: Annotated[dict[str, dict[str, Literal["viewer", "operator", "releaser", "admin"]]], NoDecode] = Field(
        {},
        description='JSON, from a value of that claim to roles by fleet, such as {"ml": {"default": "releaser"}, '
        '"ops": {"*": "admin"}}; * is every fleet. Who has no such value may do nothing.',
    )
    request_rate: float = Field(100.0, gt=0, description="Requests a second that one user or token may send for long.")
    request_burst: int = Field(1000, ge=1, description="How many of them at once, after a pause.")
    anonymous_rate: float = Field(5.0, gt=0, description="The same of one address that does not prove who it is.")
    anonymous_burst: int = Field(100, ge=1, description="How many of them at once, after a pause.")
    request_max_mb: int = Field(8, ge=1, le=1024, description="Largest body in MiB of what is no upload.")
    trusted_proxies: str | None = Field(
        None,
        description="Addresses or networks of reverse proxies, by commas: their X-Forwarded-For is believed.",
    )
    database_url: str | None = Field(
        None, description="SQLAlchemy URL, such as postgresql+psycopg://…; SQLite in the state folder when absent."
    )
    broker_url: str | None = Field(
        None,
        description="mqtt://[user:password@]host:port of an external broker; of a cluster several by commas, tried in "
        "that order; embedded Mosquitto when absent.",
    )
    broker_port: int = Field(DEFAULT_BROKER_PORT, ge=1, le=65535, description="Port of the embedded broker (loopback).")
    broker_host: str = Field(
        "127.0.0.1", description="Address the embedded broker listens on; beyond loopback SHOAL_BROKER_TLS is needed."
    )
    broker_tls: bool = Field(
        False,
        description=(
            "Devices and server prove themselves to the broker by certificates of the fleet's CA. The embedded broker "
            "is set up so; an external one (mqtts://) must be: shoal broker config."
        ),
    )
    broker_public_url: str | None = Field(
        None,
        description=(
            "mqtts://host:port (several by commas) that enrolled devices are told; the host they enrolled at, with the "
            "embedded broker's port, when absent."
        ),
    )
    drain_s: float = Field(
        0.0,
        ge=0,
        le=600,
        description="How long a server that was told to end still answers, while /readyz says that it is not ready, in "
        "seconds: long enough for a balancer to see it.",
    )
    download_url: str | None = Field(
        None,
        description=(
            "https://host:port under which devices reach this REST API, to fetch artifacts over HTTPS where MQTT does "
            "not bring them; they are told none when absent."
        ),
    )
    tls: bool = Field(
        False,
        description="The REST API speaks HTTPS, by the fleet's CA or SHOAL_TLS_CERT; devices enrol over it.",
    )
    tls_cert: Path | None = Field(None, description="The REST API's own certificate chain (PEM), with SHOAL_TLS_KEY.")
    tls_key: Path | None = Field(None, description="Its key (PEM).")
    tls_names: str = Field(
        "",
        description=(
            "Host names and addresses, by commas, that the server's certificates are made for, besides this machine's "
            "name, localhost and the addresses it listens on."
        ),
    )
    ca_cert: Path | None = Field(
        None, description="A CA of your own (PEM: the issuing certificate, then those above), with SHOAL_CA_KEY."
    )
    ca_key: Path | None = Field(None, description="Its key (PEM, not encrypted). Without, a CA is made at first start.")
    certificate_days: float = Field(
        90.0, gt=0, le=3650, description="How long devices' certificates are valid, in days."
    )
    pending_enrolments: int = Field(
        200, ge=0, le=100_000, description="Devices without a token that may wait for approval; 0 lets none."
    )
    mosquitto: str = Field("mosquitto", description="The Mosquitto executable of the embedded broker.")
    artifacts_url: str | None = Field(
        None, description="Where artifacts are kept: file://, s3://, gs://, az://; a state sub-folder when absent."
    )
    upload_max_mb: int = Field(2048, ge=1, description="Largest upload in MiB.")
    conversion_workers: int | None = Field(
        None,
        ge=0,
        le=64,
        description="Conversions run at once: 1 when absent, 16 on a Dask cluster; 0 runs none in this process.",
    )
    conversion_timeout_s: float = Field(
        1800.0, gt=0, description="A conversion that takes longer, in seconds, is ended."
    )
    training_timeout_s: float = Field(
        21600.0, gt=0, description="A conversion that trains first and takes longer, in seconds, is ended."
    )
    conversion_memory_mb: int = Field(
        8192, ge=512, description="Data memory (RLIMIT_DATA) of one conversion process, in MiB."
    )
    conversion_cache_mb: int = Field(
        4096,
        ge=0,
        description=(
            "Earlier conversions kept in the artifact store, in MB; those not used for longest go first. 0 keeps none."
        ),
    )
    dask_scheduler: str | None = Field(
        None,
        description=(
            "tcp://host:8786 or tls://host:8786 of a Dask scheduler whose workers (shoal worker) run the conversions; "
            "child processes of this server when absent. Without TLS, whoever reaches it runs code on the workers."
        ),
    )
    dask_tls_ca: Path | None = Field(None, description="CA certificate (PEM) of the Dask cluster, for tls://.")
    dask_tls_cert: Path | None = Field(None, description="This machine's certificate (PEM) for tls://.")
    dask_tls_key: Path | None = Field(None, description="Its key (PEM) for tls://.")
    onnx2tf_python: Path | None = Field(
        None,
        description=(
            "Python of an environment with onnx2tf, which makes LiteRT files of ONNX ones; .venv-onnx2tf beside the "
            "server's own environment when absent and there."
        ),
    )
    inspect_timeout_s: float = Field(
        120.0, gt=0, description="How long the check of an uploaded version may take, in seconds."
    )
    gate_data_mb: int = Field(
        512, ge=1, description="Largest evaluation set, in MiB, that a gate run sends to devices."
    )
    gate_candidate_timeout_s: float = Field(
        600.0, gt=0, description="How long a device may take to measure one candidate of a gate run, in seconds."
    )
    deltas: bool = Field(
        True, description="Make differences to what devices hold, and compressed forms, of what rollouts send."
    )
    delta_wait_s: float = Field(
        300.0, ge=0, description="How long a stage may wait for differences that are being made for it, in seconds."
    )
    delta_timeout_s: float = Field(1800.0, gt=0, description="Making one that takes longer, in seconds, is ended.")
    delta_memory_mb: int = Field(
        2048,
        ge=256,
        description="Data memory (RLIMIT_DATA) of the process that makes one, in MiB. Files of up to a twentieth of it "
        "are also compared as bsdiff does.",
    )
    telemetry_interval_s: float = Field(
        10.0, ge=0.1, description="How often devices make a telemetry batch, in seconds."
    )
    telemetry_windows_days: float = Field(
        7.0, gt=0, le=3650, description="How long windows are kept as devices sent them, in days."
    )
    telemetry_hours_days: float = Field(
        90.0, gt=0, le=36500, description="How long hours of telemetry are kept, in days; then they are days."
    )
    telemetry_days_days: float = Field(
        1095.0, gt=0, le=36500, description="How long days of telemetry are kept, in days."
    )
    telemetry_hosts_days: float = Field(
        7.0, gt=0, le=3650, description="How long what devices say of themselves is kept, in days."
    )
    overview_days: float = Field(
        90.0, gt=0, le=3650, description="How long it is kept how fleets were, hour by hour, in days."
    )
    samples_days: float = Field(
        30.0, gt=0, le=3650, description="How long samples that devices sent are kept, in days."
    )
    commands_days: float = Field(
        14.0, gt=0, le=3650, description="How long commands to devices are kept when they are over, in days."
    )
    probation_s: float = Field(
        5.0, ge=0, description="How long a device watches a new version before it counts, in seconds."
    )
    agent_confirm_s: float = Field(
        120.0,
        ge=1,
        le=3600,
        description="Within how many seconds of its start a new release of the agent must be connected and serve what "
        "its device served before; else the device takes it back.",
    )
    delivery_mb_s: float | None = Field(
        None,
        gt=0,
        description="MB (1,000,000 bytes) a second that this server sends of artifacts, to all devices together; as "
        "fast as they take it when absent.",
    )
    engine_tick_s: float = Field(0.5, gt=0, description="How often rollouts are judged, in seconds.")
    trust_keys: Path | None = Field(
        None,
        description="Folder of the keys this server signs with; trust in the state folder when absent.",
    )
    webhook_retry_hours: float = Field(
        24.0, gt=0, le=24 * 14, description="How long an event that a webhook does not take is tried again, in hours."
    )
    webhook_allow_private: bool = Field(
        False,
        description="Webhooks may be http://, and at loopback, private and link-local addresses: for receivers within "
        "the server's own network. Whoever may create webhooks reaches all that the server reaches then.",
    )
    alert_tick_s: float = Field(
        10.0,
        gt=0,
        le=600,
        description="How often alert rules are looked at, in seconds; those over telemetry less often.",
    )
    alert_days: float = Field(
        90.0, gt=0, le=3650, description="How long alerts that resolved, and silences that ended, are kept, in days."
    )
    smtp_host: str | None = Field(
        None, description="The mail server that takes e-mails of alerts; without, none can be sent."
    )
    smtp_port: int = Field(587, ge=1, le=65535, description="Its port.")
    smtp_security: Literal["starttls", "tls", "none"] = Field(
        "starttls", description="starttls, tls (from the first byte, mostly port 465), or none."
    )
    smtp_user: str | None = Field(None, description="Who to log in as there; nobody when absent.")
    smtp_password: SecretStr | None = Field(None, description="With this password.")
    smtp_from: str | None = Field(None, description="Address that e-mails of alerts come from; needed to send any.")
    smtp_ca: Path | None = Field(
        None, description="Certificates (PEM) that it is checked by; those of the system when absent."
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="text for people, or json: an object a line, with the ids of what it is about."
    )
    otlp_endpoint: str | None = Field(
        None,
        description="http(s)://host:port of an OpenTelemetry collector that takes OTLP over HTTP: requests and "
        "rollouts are traced to it. OTEL_EXPORTER_OTLP_ENDPOINT does the same. Needs shoal[otel].",
    )
    otlp_metrics: bool = Field(
        False, description="What GET /metrics says goes to that collector too (OTEL_METRICS_EXPORTER=otlp likewise)."
    )
    otlp_interval_s: float = Field(60.0, ge=1, le=3600, description="How often that is done, in seconds.")
    metrics: MetricsAccess = Field(
        "loopback",
        description="Who may read GET /metrics: loopback for processes on this machine, and tokens; token for those "
        "alone; open for whoever reaches the API; off for nobody. A fleet's token gets that fleet's figures.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="DEBUG, INFO, WARNING or ERROR."
    )

    @field_validator("log_level", mode="before")
    @classmethod
    def _in_capitals(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @field_validator("oidc_issuer")
    @classmethod
    def _is_an_issuer(cls, value: str | None) -> str | None:
        if value is not None and "?" in check_url(value):
            raise ValueError("an issuer has no query")
        return value

    @field_validator("oidc_roles", mode="before")
    @classmethod
    def _is_json(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f'it is not JSON such as {{"ml": {{"default": "releaser"}}}}: {error}') from None

    @field_validator("download_url")
    @classmethod
    def _is_http(cls, value: str | None) -> str | None:
        try:
            parts = urlsplit(value or "https://host")
            usable = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
            usable = usable and bool(parts.hostname) and parts.port != 0 and not parts.query and not parts.fragment
        except ValueError:
            usable = False
        if not usable or len(value or "") > 1024:
            raise ValueError("it is not https://host:port (http:// to this machine alone)")
        return value.rstrip("/") if value else value

    @field_validator("broker_url", "broker_public_url")
    @classmethod
    def _is_mqtt(cls, value: str | None) -> str | None:
        if value is not None:
            read_brokers(value)
        return value

    @field_validator("database_url")
    @classmethod
    def _is_a_database(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("sqlite:///", "postgresql+psycopg://")):
            raise ValueError("it is not sqlite:///FILE or postgresql+psycopg://user:password@host/name")
        return value

    @field_validator("artifacts_url")
    @classmethod
    def _is_a_store(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("file://", "s3://", "gs://", "az://")):
            raise ValueError("it is not a file://, s3://, gs:// or az:// URL")
        return value

    @field_validator("dask_scheduler")
    @classmethod
    def _is_a_scheduler(cls, value: str | None) -> str | None:
        if value is not None:
            check_dask_address(value)
        return value

    @model_validator(mode="after")
    def _dask_has_its_certificates(self) -> Self:
        files = {"ca": self.dask_tls_ca, "cert": self.dask_tls_cert, "key": self.dask_tls_key}
        check_dask_tls(self.dask_scheduler, {f"SHOAL_DASK_TLS_{name.upper()}": path for name, path in files.items()})
        return self

    @model_validator(mode="after")
    def _onnx2tf_python_is_there(self) -> Self:
        if self.onnx2tf_python is not None and not self.onnx2tf_python.exists():
            raise ValueError(f"onnx2tf_python: there is no {self.onnx2tf_python}: make setup-onnx2tf, or leave it out")
        return self

    @model_validator(mode="after")
    def _coarser_telemetry_is_kept_longer(self) -> Self:
        if not self.telemetry_windows_days <= self.telemetry_hours_days <= self.telemetry_days_days:
            raise ValueError(
                "SHOAL_TELEMETRY_WINDOWS_DAYS, SHOAL_TELEMETRY_HOURS_DAYS and SHOAL_TELEMETRY_DAYS_DAYS: each is at "
                "least as long as the one before"
            )
        return self

    @model_validator(mode="after")
    def _beyond_loopback_needs_a_token(self) -> Self:
        if not is_loopback(self.host) and self.admin_token is None:
            raise ValueError(
                f"host {self.host!r} is reachable from other machines: set SHOAL_ADMIN_TOKEN, or listen on 127.0.0.1"
            )
        return self

    @model_validator(mode="after")
    def _a_provider_is_whole(self) -> Self:
        if bool(self.oidc_issuer) != bool(self.oidc_client_id):
            raise ValueError("SHOAL_OIDC_ISSUER and SHOAL_OIDC_CLIENT_ID go together: give both")
        if bool(self.oidc_issuer) != bool(self.oidc_roles):
            raise ValueError(
                "SHOAL_OIDC_ISSUER and SHOAL_OIDC_ROLES go together: without roles nobody there may do anything"
            )
        return self

    @model_validator(mode="after")
    def _mail_is_whole(self) -> Self:
        if self.smtp_host is not None and not self.smtp_from:
            raise ValueError("SHOAL_SMTP_HOST needs SHOAL_SMTP_FROM: the address that e-mails come from")
        if bool(self.smtp_user) != bool(self.smtp_password):
            raise ValueError("SHOAL_SMTP_USER and SHOAL_SMTP_PASSWORD go together: give both")
        if self.smtp_user and self.smtp_security == "none" and not is_loopback(self.smtp_host or ""):
            raise ValueError("SHOAL_SMTP_PASSWORD could be read on its way: set SHOAL_SMTP_SECURITY to starttls or tls")
        if self.smtp_ca is not None and not self.smtp_ca.is_file():
            raise ValueError(f"SHOAL_SMTP_CA: there is no file {self.smtp_ca}")
        return self

    @model_validator(mode="after")
    def _files_come_in_pairs(self) -> Self:
        for names in (("tls_cert", "tls_key"), ("ca_cert", "ca_key")):
            given = [name for name in names if getattr(self, name) is not None]
            if len(given) == 1:
                raise ValueError(f"{' and '.join(f'SHOAL_{name.upper()}' for name in names)} go together: give both")
            for name in given:
                if not getattr(self, name).is_file():
                    raise ValueError(f"SHOAL_{name.upper()}: there is no file {getattr(self, name)}")
        if self.tls_cert is not None and not self.tls:
            raise ValueError("SHOAL_TLS_CERT serves HTTPS: set SHOAL_TLS=true, or leave it out")
        return self

    @model_validator(mode="after")
    def _devices_beyond_loopback_need_certificates(self) -> Self:
        if not is_loopback(self.broker_host) and not self.broker_tls:
            raise ValueError(
                f"broker_host {self.broker_host!r} is reachable from other machines: set SHOAL_BROKER_TLS=true, or "
                "let the broker listen on 127.0.0.1"
            )
        if self.broker_tls and self.broker_url is not None and not self.broker_url.startswith("mqtts://"):
            raise ValueError("SHOAL_BROKER_TLS needs a broker that speaks TLS: SHOAL_BROKER_URL=mqtts://host:port")
        return self

    @property
    def server_names(self) -> list[str]:
        """Host names and addresses that the server's certificates are for; the first is its main one."""
        own = [one.strip() for one in self.tls_names.split(",") if one.strip()]
        bound = [one for one in (self.host, self.broker_host) if one not in {"0.0.0.0", "::", ""}]  # noqa: S104
        found = dict.fromkeys([*own, *bound, socket.gethostname(), "localhost", "127.0.0.1", "::1"])
        return [one for one in found if one]

    @property
    def delivery_rate(self) -> float | None:
        """Bytes of artifacts a second."""
        return self.delivery_mb_s * 1e6 if self.delivery_mb_s is not None else None

    @property
    def effective_onnx2tf_python(self) -> Path | None:
        """The interpreter with onnx2tf, when there is one."""
        return find_onnx2tf_python(self.onnx2tf_python)

    @property
    def effective_conversion_workers(self) -> int:
        """Conversions at once: those of a cluster run elsewhere, so this server only waits for them."""
        if self.conversion_workers is not None:
            return self.conversion_workers
        return DASK_JOBS if self.dask_scheduler else 1

    @property
    def effective_trust_keys(self) -> Path:
        """The folder of signing keys in use."""
        return self.trust_keys or self.state_dir / "trust"

    @property
    def effective_artifacts_url(self) -> str:
        """The artifact store in use, as a URL."""
        return self.artifacts_url or (self.state_dir.absolute() / "artifacts").as_uri()

    @property
    def effective_database_url(self) -> str:
        """The SQLAlchemy URL in use."""
        return self.database_url or f"sqlite:///{self.state_dir / 'shoal.db'}"

    @property
    def effective_broker_url(self) -> str:
        """The MQTT URL in use."""
        if self.broker_url is not None:
            return self.broker_url
        if not self.broker_tls:
            return f"mqtt://127.0.0.1:{self.broker_port}"
        host = "127.0.0.1" if self.broker_host in {"0.0.0.0", "::"} else self.broker_host  # noqa: S104
        return f"mqtts://{f'[{host}]' if ':' in host else host}:{self.broker_port}"
