"""Complete configurations of brokers of your own: certificates, who may do what. Pure: what is known in, texts out.

Each maps a device's certificate to a user and lets it use its own topics only, as the embedded broker does. Where a
broker can't do a part of it, the text of its configuration says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePath

from agent.protocol.limits import LIMITS
from agent.protocol.topics import FROM_DEVICE, ROOT, TO_DEVICE, alerts_topic, device_topic
from fleet_server.enrolment.ids import LISTENER_NAME, server_name
from fleet_server.gateway import mosquitto
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.seat import MOST_SERVERS

SUBJECTS = ROOT.replace("/", ".")
VERNEMQ = """\
# Written by Shoal: shoal broker config --kind vernemq
# VerneMQ takes whatever client id a client names: a device may end another's session (not read or write its topics).
accept_eula = no
# Who may listen to alerts (shoal broker listener) may listen to artifacts that are broadcast too.
# The only listener wants a certificate of the fleet's CA; its name is the user that the access list knows.
allow_anonymous = on
allow_register_during_netsplit = on
max_message_size = {message}
max_inflight_messages = 200
max_online_messages = 100000
max_offline_messages = 1000
persistent_client_expiration = 2w
plugins.vmq_passwd = off
plugins.vmq_acl = on
vmq_acl.acl_file = {folder}/acl
listener.ssl.default = {host}:{port}
listener.ssl.default.max_connections = {connections}
listener.ssl.default.cafile = {folder}/ca.pem
listener.ssl.default.certfile = {folder}/server.pem
listener.ssl.default.keyfile = {folder}/server.key
listener.ssl.default.crlfile = {folder}/crl.pem
listener.ssl.default.require_certificate = on
listener.ssl.default.use_identity_as_username = on
listener.ssl.default.allowed_protocol_versions = 3,4,5
"""
NATS = """\
# Written by Shoal: shoal broker config --kind nats
# NATS knows no revocation lists: devices are listed, one that was locked out is not. Write this file again when devices
# enrol or are locked out, then: nats-server --signal reload. Of a user no longer listed the connection is ended.
# NATS takes whatever client id a client names: a device may end another's session (not read or write its topics).
server_name: shoal
max_payload: {payload}
max_connections: {connections}
jetstream {{
  store_dir: {store}
}}
# MQTT needs a listener for NATS clients: it is for this machine, and nobody is a user of it without a certificate.
listen: "127.0.0.1:4222"
tls {{
  cert_file: {certificate}
  key_file: {key}
  ca_file: {ca}
  verify_and_map: true
}}
mqtt {{
  listen: {listen}
  max_ack_pending: 200
  tls {{
    cert_file: {certificate}
    key_file: {key}
    ca_file: {ca}
    verify_and_map: true
  }}
}}
authorization {{
  users: [
{users}
  ]
}}
"""


class BrokerKind(StrEnum):
    """Brokers that configurations are written for."""

    MOSQUITTO = "mosquitto"
    NATS = "nats"
    VERNEMQ = "vernemq"


@dataclass(frozen=True)
class Place:
    """Where the broker listens, and where its files will lie on its machine."""

    folder: PurePath
    host: str
    port: int


def files(kind: BrokerKind, place: Place, devices: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The files by name, besides ca.pem, crl.pem, server.pem and server.key.

    Args:
        kind: of the broker.
        place: where it runs.
        devices: id and fleet of each that is not locked out; only NATS has to know them.
    """
    match kind:
        case BrokerKind.MOSQUITTO:
            listener = mosquitto.Listener(place.folder, place.host, place.port, tls=True)
            return {"mosquitto.conf": mosquitto.configuration(listener), "acl": mosquitto.access_list()}
        case BrokerKind.VERNEMQ:
            text = VERNEMQ.format(
                folder=place.folder,
                host=place.host,
                port=place.port,
                message=LIMITS.message_bytes,
                connections=mosquitto.CONNECTIONS,
            )
            return {"vernemq.conf": text, "acl": mosquitto.access_list(denies=False)}
        case BrokerKind.NATS:
            return {"nats.conf": _nats(place, devices)}


def _nats(place: Place, devices: Sequence[tuple[str, str]]) -> str:
    users = [
        _nats_user(f"CN={server_name(number)},O={DEFAULT_FLEET}", [f"{SUBJECTS}.>"], [f"{SUBJECTS}.>"])
        for number in range(1, MOST_SERVERS + 1)
    ]
    users.append(_nats_user(f"CN={LISTENER_NAME},O={DEFAULT_FLEET}", {"deny": [">"]}, [subject(alerts_topic("*"))]))
    for device_id, fleet in devices:
        own = device_topic(device_id, next(iter(FROM_DEVICE))).rpartition("/")[0]
        speaks = [subject(f"{own}/{leaf}") for leaf in sorted(FROM_DEVICE)]
        hears = [subject(f"{own}/{leaf}") for leaf in sorted(TO_DEVICE)]
        hears += [subject(f"{own}/b") + ".>", f"{SUBJECTS}.b.>"]
        users.append(_nats_user(f"CN={device_id},O={fleet}", speaks, hears))
    names = ("server.pem", "server.key", "ca.pem", "jetstream")
    quoted = {name: json.dumps(str(place.folder / name)) for name in names}
    host = f"[{place.host}]" if ":" in place.host else place.host
    return NATS.format(
        payload=mosquitto.PACKET_BYTES,
        connections=mosquitto.CONNECTIONS,
        store=quoted["jetstream"],
        certificate=quoted["server.pem"],
        key=quoted["server.key"],
        ca=quoted["ca.pem"],
        listen=json.dumps(f"{host}:{place.port}"),
        users="\n".join(f"    {one}" for one in users),
    )


def subject(topic: str) -> str:
    """A topic as NATS maps it: dots part the levels, and a dot within a level is two slashes (NATS 2.10 or newer)."""
    return ".".join(level.replace(".", "//") for level in topic.split("/"))


def _nats_user(name: str, publish: list[str] | dict[str, list[str]], subscribe: list[str]) -> str:
    """`$MQTT.sub` is how NATS delivers QoS 1 to a client."""
    permissions = {"publish": publish, "subscribe": [*subscribe, "$MQTT.sub.>"]}
    kinds = ["MQTT"]
    return json.dumps({"user": name, "permissions": permissions, "allowed_connection_types": kinds})
