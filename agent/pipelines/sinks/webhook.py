"""POST requests with one event or several, signed as the fleet server signs its webhooks; no redirects."""

from __future__ import annotations

import hashlib
import http.client
import ssl
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from agent.pipelines.config import WebhookSink
from agent.pipelines.events import BATCH_TYPE, CONTENT_TYPE, batch
from agent.pipelines.outbox import Kept
from agent.pipelines.sinks.sink import SinkError
from agent.protocol.signatures import headers as signed

WAIT_S = 10.0
SECRET_BYTES = 8192
UNUSABLE = (400, 413, 422)
LONGEST_AFTER_S = 3600.0


class Webhook:
    """The sink.

    Args:
        config: of it.
    """

    def __init__(self, config: WebhookSink) -> None:
        self._config = config
        self.batch = config.batch

    def send(self, events: Sequence[Kept]) -> None:
        """One POST; any 2xx takes them."""
        one = events[0]
        alone = self._config.batch == 1
        body = one.body if alone else batch([event.body for event in events])
        ids = "".join(event.id for event in events)
        message_id = one.id if alone else hashlib.sha256(ids.encode()).hexdigest()[:32]
        headers = {"Content-Type": CONTENT_TYPE if alone else BATCH_TYPE, "User-Agent": "shoal-agent"}
        headers |= self._credentials(message_id, body)
        parts = urlsplit(self._config.url)
        try:
            connection = self._connection()
            try:
                path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("POST", path, body=body, headers=headers)
                response = connection.getresponse()
                response.read(1024)
            finally:
                connection.close()
        except (OSError, http.client.HTTPException) as error:
            raise SinkError(f"{self._place()} did not answer: {str(error) or type(error).__name__}") from None
        if not 200 <= response.status < 300:
            after = response.getheader("Retry-After", "")
            seconds = float(after) if after.isascii() and after.isdigit() and len(after) < 7 else 0.0
            raise SinkError(
                f"{self._place()} answered {response.status}",
                after_s=min(seconds, LONGEST_AFTER_S),
                unusable=response.status in UNUSABLE,
            )

    def close(self) -> None:
        """Nothing: each request has a connection of its own."""

    def _credentials(self, message_id: str, body: bytes) -> dict[str, str]:
        found = {}
        if self._config.token_file:
            found["Authorization"] = f"Bearer {_secret(self._config.token_file)}"
        if self._config.secret_file:
            secret = _secret(self._config.secret_file)
            try:
                found |= signed([secret], message_id, int(time.time()), body)
            except ValueError as error:
                raise SinkError(f"secret_file: {str(error).partition(';')[0]}") from None
        return found

    def _connection(self) -> http.client.HTTPConnection:
        parts = urlsplit(self._config.url)
        if parts.scheme != "https":
            return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=WAIT_S)
        context = ssl.create_default_context(cafile=self._config.ca_file or None)
        return http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=WAIT_S, context=context)

    def _place(self) -> str:
        """A URL as people are told of it: queries may hold secrets."""
        parts = urlsplit(self._config.url)
        return f"{parts.scheme}://{parts.netloc}"


def _secret(path: str) -> str:
    """The first line of a file, which may be another one the next time.

    Raises:
        SinkError: when it can't be read, or is empty.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(SECRET_BYTES).decode("ascii")
    except OSError as error:
        raise SinkError(f"{path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SinkError(f"{path} holds no ASCII text") from None
    lines = text.split()
    if len(lines) != 1:
        raise SinkError(f"{path} must hold one word")
    return lines[0]
