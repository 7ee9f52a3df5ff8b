"""Renews the device's certificate over MQTT before it expires: a new key, a request signed by the present one, a try.

The new identity is adopted only when the broker has accepted it; until then the old one stays. Everything is on disk,
so that an agent that is killed goes on where it was.
"""

from __future__ import annotations

import logging
import ssl
import time
from zlib import crc32

from agent.config import Config
from agent.errors import IdentityError
from agent.identity import (
    CURRENT,
    NEXT,
    Identity,
    drop_identity,
    identity_folder,
    load_identity,
    load_into,
    save_identity,
)
from agent.mqtt import MqttLink
from agent.protocol.codec import encode
from agent.protocol.messages import Certificate, Renew
from agent.protocol.topics import DeviceTopic
from agent.protocol.version import SPOKEN

log = logging.getLogger(__name__)
DUE_SHARE = 0.67
JITTER_SHARE = 0.1  # of the lifetime, so that devices enrolled together do not all come at once
ASK_AGAIN_S = 60.0
ASK_SELDOM_S = 3600.0
TRY_S = 45.0


def tls_context(config: Config) -> ssl.SSLContext | None:
    """The certificates to connect with; None for a broker without TLS.

    Raises:
        IdentityError: when they can't be used.
    """
    if not config.broker_has_tls:
        return None
    context = ssl.create_default_context(cafile=config.ca_file or None)
    identity = load_identity(identity_folder(config.state_dir))
    if config.cert_file:
        try:
            context.load_cert_chain(config.cert_file, config.key_file)
        except (OSError, ValueError) as error:
            raise IdentityError(f"cert_file and key_file can't be used: {error}") from None
    elif identity is not None and identity.certificate:
        if not config.ca_file:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        load_into(context, identity_folder(config.state_dir), identity)
    return context


def due_at(identity: Identity) -> float:
    """When to renew, in Unix seconds: at two thirds of the lifetime and up to a tenth later, the same for each key."""
    lifetime = identity.not_after - identity.not_before
    jitter = crc32(identity.key_sha256.encode()) / 2**32
    return identity.not_before + lifetime * (DUE_SHARE + JITTER_SHARE * jitter)


class Renewal:
    """Called by the supervisor's main loop only.

    Args:
        config: where the identity lies.
        link: to ask over, and to reconnect.
        context: the link's certificates.
    """

    def __init__(self, config: Config, link: MqttLink, context: ssl.SSLContext) -> None:
        self._folder = identity_folder(config.state_dir)
        self._link = link
        self._context = context
        self._identity = None if config.cert_file else load_identity(self._folder)
        self._next = load_identity(self._folder, NEXT) if self._identity else None
        self._ask_at = 0.0
        self._pause = ASK_AGAIN_S
        self._trying_until: float | None = None

    def tick(self, now: float, wall: float) -> None:
        """Ask when it is time, and give up a new certificate that the broker does not take.

        Args:
            now: a monotonic clock, in seconds.
            wall: Unix seconds.
        """
        if self._trying_until is not None:
            if now > self._trying_until:
                self._give_up(now)
            return
        if self._identity is None or now < self._ask_at or not self._link.connected:
            return
        if self._next is not None and self._next.certificate:
            self._try_next(now)
        elif wall >= due_at(self._identity):
            self._ask(self._identity, now)

    def answered(self, message: Certificate) -> None:
        """Take the server's answer."""
        if message.failure is not None:
            log.error("the server gives no new certificate: %s", message.failure.detail)
            self._pause = ASK_SELDOM_S
            return
        if self._identity is None or self._next is None or message.key_sha256 != self._next.key_sha256:
            return  # an answer to what was asked before the agent was started again
        self._next = Identity(
            device_id=self._identity.device_id,
            key=self._next.key,
            key_sha256=self._next.key_sha256,
            certificate=message.certificate,
            ca=message.ca,
            broker=self._identity.broker,
            fleet=self._identity.fleet,
            not_before=message.not_before,
            not_after=message.not_after,
            server=self._identity.server,
            trust_root=self._identity.trust_root,
        )
        save_identity(self._folder, self._next, NEXT)
        self._try_next(time.monotonic())

    def link_up(self, epoch: int) -> None:
        """The broker has accepted what was tried, unless the connection is an earlier one: it holds from now on."""
        if self._trying_until is None or self._next is None or epoch != self._link.epoch:
            return
        self._trying_until = None
        save_identity(self._folder, self._next)
        load_into(self._context, self._folder, self._next)
        drop_identity(self._folder, NEXT)
        (self._folder / NEXT).with_suffix(".pem").unlink(missing_ok=True)
        self._identity, self._next = self._next, None
        self._pause, self._ask_at = ASK_AGAIN_S, 0.0
        log.info("the new certificate holds until %s", time.strftime("%F", time.gmtime(self._identity.not_after)))

    def _ask(self, identity: Identity, now: float) -> None:
        from agent.keys import TOKEN_KEY, fingerprint, new_key, sign, signing_request

        if self._next is None:
            # A key in a token stays the same one.
            key = identity.key if identity.key.startswith(TOKEN_KEY) else new_key()
            self._next = Identity(identity.device_id, key, fingerprint(key))
            save_identity(self._folder, self._next, NEXT)
        csr = signing_request(self._next.key, identity.device_id)
        self._link.publish(DeviceTopic.RENEW, encode(Renew(SPOKEN, csr, sign(identity.key, csr.encode()))))
        self._ask_at = now + self._pause
        self._pause = min(self._pause * 2, ASK_SELDOM_S)

    def _try_next(self, now: float) -> None:
        assert self._next is not None
        try:
            load_into(self._context, self._folder, self._next, NEXT)
        except IdentityError:
            log.exception("the new certificate can't be used; asking for another")
            drop_identity(self._folder, NEXT)
            self._next, self._ask_at = None, now + ASK_SELDOM_S
            self._back_to_old()
            return
        log.info("trying the new certificate")
        self._trying_until = now + TRY_S
        self._link.reconnect()

    def _give_up(self, now: float) -> None:
        log.error("the broker did not take the new certificate; back to the old one")
        self._trying_until, self._ask_at = None, now + ASK_SELDOM_S
        self._back_to_old()
        self._link.reconnect()

    def _back_to_old(self) -> None:
        """OpenSSL may have taken half of what did not work."""
        assert self._identity is not None
        load_into(self._context, self._folder, self._identity, CURRENT)
