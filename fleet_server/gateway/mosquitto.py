"""Mosquitto's configuration, for the embedded broker and for one of your own. Pure: names in, text out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from agent.protocol.limits import LIMITS
from agent.protocol.topics import FROM_DEVICE, ROOT, TO_DEVICE, alerts_topic
from fleet_server.enrolment.ids import LISTENER_NAME, server_name
from fleet_server.seat import MOST_SERVERS

PACKET_BYTES = LIMITS.message_bytes + 64 * 1024  # a payload, its topic and properties
CONNECTIONS = 50_000
COMMON = """\
# Written by Shoal; changes are lost.
persistence true
persistence_location {folder}/
autosave_interval 5
max_inflight_messages 200
max_queued_messages 100000
max_packet_size {packet}
sys_interval 0
log_dest stderr
log_type error
log_type warning
"""
OPEN = """\
listener {port} 127.0.0.1
allow_anonymous true
"""
MUTUAL_TLS = """\
allow_anonymous false
acl_file {folder}/acl
max_queued_bytes {queued}
persistent_client_expiration 14d
listener {port} {host}
max_connections {connections}
cafile {folder}/ca.pem
certfile {folder}/server.pem
keyfile {folder}/server.key
crlfile {folder}/crl.pem
require_certificate true
# The certificate's common name is the user and the client id: nobody takes over another's session.
use_identity_as_username true
use_username_as_clientid true
"""


@dataclass(frozen=True)
class Listener:
    """Where the broker listens.

    Attributes:
        folder: of its files: ca.pem, server.pem, server.key, crl.pem, acl, and what it keeps.
        host: address.
        port: of it.
        tls: mutual TLS with the access list, or open to everybody on loopback.
    """

    folder: PurePath
    host: str
    port: int
    tls: bool


def configuration(listener: Listener) -> str:
    """The text of mosquitto.conf."""
    form = COMMON + (MUTUAL_TLS if listener.tls else OPEN)
    return form.format(
        folder=listener.folder,
        host=listener.host,
        port=listener.port,
        packet=PACKET_BYTES,
        queued=256 * 1024 * 1024,
        connections=CONNECTIONS,
    )


def access_list(*, denies: bool = True) -> str:
    """Its access list: a device speaks and listens below its own id only; broadcast chunks are for the whole fleet.

    One more name may listen to alerts. Patterns hold for it too: what it is not to hear of these is denied.

    Args:
        denies: whether the broker knows how to.
    """
    own = f"{ROOT}/+/d/%u"
    lines = []
    for number in range(1, MOST_SERVERS + 1):
        lines += [f"user {server_name(number)}", f"topic readwrite {ROOT}/#", ""]
    denied = [f"topic deny {ROOT}/b/#"] if denies else []
    lines += [f"user {LISTENER_NAME}", f"topic read {alerts_topic('+')}", *denied, ""]
    lines += [f"pattern write {own}/{leaf}" for leaf in sorted(FROM_DEVICE)]
    lines += [f"pattern read {own}/{leaf}" for leaf in sorted(TO_DEVICE)]
    lines += [f"pattern read {own}/b/+/+", f"pattern read {ROOT}/b/+/+"]
    return "\n".join(lines) + "\n"
