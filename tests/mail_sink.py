"""A mail server on loopback (RFC 5321) that keeps what it is given: STARTTLS, AUTH PLAIN, replies as a test wants."""

from __future__ import annotations

import base64
import contextlib
import email
import email.policy
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import EmailMessage
from pathlib import Path

from agent.keys import new_key, signing_request
from fleet_server.trust.ca import FleetCa, read_request


class MailSink:
    """What came, and what the server says.

    Attributes:
        got: messages that were taken.
        recipients: of each.
        logins: user and password of each login, and whether the connection was encrypted by then.
        reply: what is said to a step, such as `RCPT TO:<a@b>`; None lets it go on as usual.
        encrypted: of each message, whether it came so.
    """

    def __init__(self, context: ssl.SSLContext | None) -> None:
        self.got: list[EmailMessage] = []
        self.recipients: list[list[str]] = []
        self.logins: list[tuple[str, str, bool]] = []
        self.encrypted: list[bool] = []
        self.reply: Callable[[str], str | None] = lambda _: None
        sink = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):  # who does not trust the server goes away
                    _Conversation(sink, self, context).go_on()
                self.connection.close()

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Conversation:
    def __init__(
        self, sink: MailSink, handler: socketserver.StreamRequestHandler, context: ssl.SSLContext | None
    ) -> None:
        self._sink, self._handler, self._context = sink, handler, context
        self._secure = False
        self._taken: list[str] = []

    def _say(self, text: str) -> None:
        self._handler.wfile.write(f"{text}\r\n".encode())
        self._handler.wfile.flush()

    def go_on(self) -> None:
        self._say("220 sink")
        while line := self._handler.rfile.readline(2000).decode().rstrip("\r\n"):
            said = self._sink.reply(line)
            if said is not None:
                self._say(said)
            elif not self._step(line):
                return

    def _step(self, line: str) -> bool:
        verb = line.split(" ", maxsplit=1)[0].upper()
        if verb == "EHLO":
            offers = ["AUTH PLAIN", *(["STARTTLS"] if self._context and not self._secure else [])]
            self._say("250-sink")
            for one in offers[:-1]:
                self._say(f"250-{one}")
            self._say(f"250 {offers[-1]}")
        elif verb == "STARTTLS" and self._context is not None:
            self._say("220 go on")
            wrapped = self._context.wrap_socket(
                self._handler.connection, server_side=True, do_handshake_on_connect=False
            )
            self._handler.connection, self._secure = wrapped, True
            wrapped.do_handshake()
            self._handler.rfile, self._handler.wfile = wrapped.makefile("rb"), wrapped.makefile("wb")
        elif verb == "AUTH":
            _, user, password = base64.b64decode(line.split(" ")[2]).decode().split("\0")
            self._sink.logins.append((user, password, self._secure))
            self._say("235 you are in" if password == "right" else "535 wrong")
        elif verb == "RCPT":
            self._taken.append(line.partition("<")[2].rstrip(">"))
            self._say("250 ok")
        elif verb == "DATA":
            self._say("354 go on")
            lines = []
            while (data := self._handler.rfile.readline()) not in {b".\r\n", b""}:
                lines.append(data[1:] if data.startswith(b".") else data)
            self._sink.encrypted.append(self._secure)
            self._sink.recipients.append(self._taken)
            self._sink.got.append(email.message_from_bytes(b"".join(lines), policy=email.policy.default))  # type: ignore[arg-type]
            self._say("250 kept")
        elif verb == "QUIT":
            self._say("221 bye")
            return False
        else:  # MAIL, RSET, NOOP
            self._taken = []
            self._say("250 ok")
        return True


def server_context(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A context of a server at 127.0.0.1, and the certificate that it is checked by."""
    ca, key = FleetCa.open(folder / "ca", "default"), new_key()
    issued = ca.issue_server(read_request(signing_request(key, "127.0.0.1")), ["127.0.0.1"], "default")
    (folder / "mail.pem").write_text(issued.pem)
    (folder / "mail.key").write_text(key)
    (folder / "mail-ca.pem").write_text(ca.bundle)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "mail.pem", folder / "mail.key")
    return context, folder / "mail-ca.pem"


@contextmanager
def mail_sink(context: ssl.SSLContext | None = None) -> Iterator[MailSink]:
    """A mail server; with a context it offers STARTTLS."""
    sink = MailSink(context)
    try:
        yield sink
    finally:
        sink.stop()
