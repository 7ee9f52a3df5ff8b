"""`shoal broker`: configurations of brokers that are not the embedded one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fleet_server.cli.output import client, errors, fail
from fleet_server.gateway.broker_configurations import BrokerKind, Place, files
from fleet_server.trust.ca import key_pem, write_private

broker = typer.Typer(no_args_is_help=True, help="A broker of your own, and who listens to alerts there.")


@broker.callback()
def _group() -> None:
    """A broker of your own, and who listens to alerts there."""


@broker.command("config")
def config(
    context: typer.Context,
    kind: Annotated[BrokerKind, typer.Option(help="mosquitto, nats or vernemq.")],
    out: Annotated[Path, typer.Option(help="Folder to write to; it is where the broker will read its files.")],
    names: Annotated[
        list[str], typer.Option("--name", help="Host name or address that devices reach it by; repeatable.")
    ],
    host: Annotated[str, typer.Option(help="Address it listens on.")] = "0.0.0.0",  # noqa: S104 (it wants certificates)
    port: Annotated[int, typer.Option(help="Port it listens on.", min=1, max=65535)] = 8883,
) -> None:
    """Write a broker's configuration, access list and certificates.

    Its key is made here and stays here. Run it again to renew them: the key and what the broker keeps stay as they are.

    Example: shoal broker config --kind mosquitto --out ./broker --name mqtt.example
    """
    folder = out.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        key = _key(folder) or ec.generate_private_key(ec.SECP256R1())
    except (OSError, ValueError) as error:
        raise fail(f"--out: {folder} can't be used ({error})") from None
    body = {"csr": _request(key, names[0]), "names": names}
    with client(context) as api:
        issued = api.post("/server-certificates", body)
        devices = [(one["device_id"], one["fleet"]) for one in api.items("/device-identities") if not one["revoked_at"]]
    write_private(folder / "server.key", key_pem(key))
    written = files(kind, Place(folder, host, port), devices)
    written |= {"server.pem": issued["certificate"], "ca.pem": issued["ca"], "crl.pem": issued["crl"]}
    for name, text in written.items():
        write_private(folder / name, text)
    errors.print(f"wrote {', '.join(sorted([*written, 'server.key']))} to {folder}")
    errors.print(f"the server: SHOAL_BROKER_TLS=true SHOAL_BROKER_URL=mqtts://{names[0]}:{port}")


@broker.command("listener")
def listener(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
) -> None:
    """Write key and certificate of a program that listens to alerts.

    It may read shoal/v1/alerts/FLEET of every fleet, and nothing else; run it again within a year to renew it.

    Example: shoal broker listener --out ./alerts
    """
    folder = out.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        key = _key(folder, "alerts.key") or ec.generate_private_key(ec.SECP256R1())
    except (OSError, ValueError) as error:
        raise fail(f"--out: {folder} can't be used ({error})") from None
    with client(context) as api:
        issued = api.post("/server-certificates", {"csr": _request(key, "shoal-alerts"), "purpose": "alerts"})
    write_private(folder / "alerts.key", key_pem(key))
    write_private(folder / "alerts.pem", issued["certificate"])
    write_private(folder / "ca.pem", issued["ca"])
    errors.print(f"wrote alerts.key, alerts.pem, ca.pem to {folder}")


def _request(key: ec.EllipticCurvePrivateKey, name: str) -> str:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    csr = x509.CertificateSigningRequestBuilder(subject_name=subject).sign(key, hashes.SHA256())
    return csr.public_bytes(serialization.Encoding.PEM).decode()


def _key(folder: Path, name: str = "server.key") -> ec.EllipticCurvePrivateKey | None:
    """The key that was made before."""
    path = folder / name
    if not path.exists():
        return None
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{name} is no elliptic-curve key: remove it")  # noqa: TRY004 (of a file, not of a caller)
    return key
