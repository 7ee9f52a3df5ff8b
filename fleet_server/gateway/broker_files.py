"""The embedded broker's files below the state folder: configuration, access list, certificates, revocations."""

from __future__ import annotations

import datetime as dt
import os
import ssl
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fleet_server.enrolment.ids import server_name
from fleet_server.gateway import mosquitto
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.settings import Settings
from fleet_server.trust.ca import SERVER_DAYS, FleetCa, key_pem, write_private

EVICTION = dt.timedelta(minutes=5)


class BrokerFiles:
    """Writes them; the CA is used where devices need certificates.

    Args:
        settings: where they are.
        ca: issues certificates.
        number: of this server among those of its database.
    """

    def __init__(self, settings: Settings, ca: FleetCa, number: int = 1) -> None:
        self._server = server_name(number)
        self._client = "client.pem" if number == 1 else f"client-{number}.pem"
        self._settings = settings
        self._ca = ca
        self._listed: list[str] | None = None
        self._issued_at = dt.datetime.min.replace(tzinfo=dt.UTC)
        self.folder = (settings.state_dir / "broker").absolute()

    def write_configuration(self) -> Path:
        """Everything but certificates and revocations; returns the path of mosquitto.conf."""
        self.folder.mkdir(parents=True, exist_ok=True)
        listener = mosquitto.Listener(
            self.folder, self._settings.broker_host, self._settings.broker_port, self._settings.broker_tls
        )
        text = mosquitto.configuration(listener)
        if os.geteuid() == 0:
            # Started by root, Mosquitto becomes the user `mosquitto` where there is one; the state stays root's.
            text += "user root\n"
        path = self.folder / "mosquitto.conf"
        path.write_text(text)
        write_private(self.folder / "acl", mosquitto.access_list())
        return path

    def write_certificates(self, now: dt.datetime) -> bool:
        """New certificates of the broker and of the server as its client, when they are old; says whether they were."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if now - self._issued_at < dt.timedelta(days=SERVER_DAYS / 2):
            return False
        key = ec.generate_private_key(ec.SECP256R1())
        server = self._ca.issue_server(key.public_key(), self._settings.server_names, DEFAULT_FLEET)
        write_private(self.folder / "server.key", key_pem(key))
        write_private(self.folder / "server.pem", server.pem)
        write_private(self.folder / "ca.pem", self._ca.bundle)
        self._write_client(self._client, self._server, DEFAULT_FLEET, dt.timedelta(days=SERVER_DAYS))
        self._issued_at = now
        return True

    def write_revocations(self, revoked: Sequence[tuple[str, dt.datetime]], now: dt.datetime) -> bool:
        """The revocation list, when it differs from the last or is old; says whether it did.

        Of two lists the broker may hold it believes the later one, and times have whole seconds: each is made later.
        """
        path = self.folder / "crl.pem"
        serials = [serial for serial, _ in revoked]
        last = x509.load_pem_x509_crl(path.read_bytes()).last_update_utc if path.exists() else None
        fresh = last is not None and last > now - dt.timedelta(days=1)
        if fresh and serials == self._listed:
            return False
        at = now.replace(microsecond=0)
        if last is not None and at <= last:
            at = last + dt.timedelta(seconds=1)
        write_private(path, self._ca.revocation_list(revoked, at))
        self._listed = serials
        return True

    def load_client(self, context: ssl.SSLContext) -> None:
        """Let a context connect as the server, and believe the fleet's CA."""
        context.load_verify_locations(cadata=self._ca.bundle)
        context.load_cert_chain(self.folder / self._client)

    def context_as(self, device_id: str, fleet: str) -> ssl.SSLContext:
        """A context that connects as a device of a fleet for the next minutes, to take its session over and end it."""
        name = f".as-{device_id}.pem"
        context = ssl.create_default_context(cadata=self._ca.bundle)
        self._write_client(name, device_id, fleet, EVICTION)
        try:
            context.load_cert_chain(self.folder / name)
        finally:
            (self.folder / name).unlink()
        return context

    def _write_client(self, name: str, common_name: str, fleet: str, lifetime: dt.timedelta) -> None:
        issued, key = self._ca.issue_client(common_name, fleet, lifetime)
        write_private(self.folder / name, key_pem(key) + issued.pem)
