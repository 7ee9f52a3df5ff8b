"""The REST API's own certificate: the operator's, or one of the fleet's CA that is made anew at every start."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from fleet_server.principals import DEFAULT_FLEET
from fleet_server.settings import Settings
from fleet_server.trust.ca import FleetCa, key_pem, write_private


def https_certificate(settings: Settings, ca: FleetCa) -> tuple[Path, Path]:
    """Files with the certificate chain and its key."""
    if settings.tls_cert is not None and settings.tls_key is not None:
        return settings.tls_cert, settings.tls_key
    key = ec.generate_private_key(ec.SECP256R1())
    issued = ca.issue_server(key.public_key(), settings.server_names, DEFAULT_FLEET)
    folder = settings.state_dir / "https"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    certificate, secret = folder / "server.pem", folder / "server.key"
    write_private(secret, key_pem(key))
    write_private(certificate, issued.pem)
    return certificate, secret
