"""Sends e-mails that wait: of several servers one at a time, under a lease; at least once, each with the same id."""

from __future__ import annotations

import datetime as dt
import logging
import random
import smtplib
import ssl
from dataclasses import dataclass
from email.message import EmailMessage
from email.utils import format_datetime

from fleet_server.alerts import repository
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.leases import DatabaseLease
from fleet_server.models import AlertMail
from fleet_server.settings import Settings
from fleet_server.ticker import Ticker
from fleet_server.webhooks.schedule import Outcome, next_try

log = logging.getLogger(__name__)
LEASE = "alert-mailer"
LEASE_S = 40.0  # longer than a conversation takes that goes well; who takes over meanwhile sends it again
EVERY_S = 2.0
AT_ONCE = 20
TIMEOUT_S = 10.0  # of each step of a conversation
LIFETIME = dt.timedelta(hours=24)
PERMANENT = 500  # replies from here on mean that trying again is of no use (RFC 5321)


@dataclass(frozen=True)
class Sent:
    """What became of a try: `taken` by the mail server for somebody at least, or not, `final`ly or for now."""

    taken: bool
    detail: str = ""
    final: bool = False


def message_of(mail: AlertMail, sender: str) -> EmailMessage:
    """An e-mail as it is sent; its Message-ID is the same on every try, so that receivers see what came twice."""
    message = EmailMessage()
    message["From"], message["To"] = sender, ", ".join(mail.recipients)
    message["Subject"] = mail.subject
    message["Date"] = format_datetime(mail.created_at)
    message["Message-ID"] = f"<{mail.id}@{sender.rpartition('@')[2].strip('> ') or 'shoal'}>"
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834: nobody answers that they are away
    message.set_content(mail.body)
    return message


def send(settings: Settings, mail: AlertMail) -> Sent:
    """Give an e-mail to the mail server."""
    assert settings.smtp_host is not None
    assert settings.smtp_from is not None
    try:
        with _connect(settings, settings.smtp_host) as server:
            if settings.smtp_user is not None and settings.smtp_password is not None:
                server.login(settings.smtp_user, settings.smtp_password.get_secret_value())
            refused = server.send_message(
                message_of(mail, settings.smtp_from), settings.smtp_from, list(map(str, mail.recipients))
            )
    except smtplib.SMTPRecipientsRefused as error:
        final = all(code >= PERMANENT for code, _ in error.recipients.values())
        return Sent(taken=False, detail=f"nobody was taken: {_refused(error.recipients)}", final=final)
    except smtplib.SMTPResponseException as error:
        return Sent(taken=False, detail=f"it said {error.smtp_code} {_text(error.smtp_error)}")
    except (smtplib.SMTPException, OSError, ValueError) as error:
        return Sent(taken=False, detail=f"{type(error).__name__}: {error}")
    return Sent(taken=True, detail=f"not taken for {_refused(refused)}" if refused else "")


def _connect(settings: Settings, host: str) -> smtplib.SMTP:
    context = ssl.create_default_context(cafile=str(settings.smtp_ca) if settings.smtp_ca else None)
    if settings.smtp_security == "tls":
        return smtplib.SMTP_SSL(host, settings.smtp_port, timeout=TIMEOUT_S, context=context)
    server = smtplib.SMTP(host, settings.smtp_port, timeout=TIMEOUT_S)
    if settings.smtp_security == "starttls":
        try:
            server.starttls(context=context)
        except BaseException:
            server.close()
            raise
    return server


def _refused(recipients: dict[str, tuple[int, bytes]]) -> str:
    return "; ".join(f"{who}: {code} {_text(said)}" for who, (code, said) in list(recipients.items())[:5])


def _text(said: bytes | str) -> str:
    return said.decode(errors="replace") if isinstance(said, bytes) else said


class AlertMailer:
    """The thread; where no mail server is set, it sends nothing, and what waits goes on waiting."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._lease = DatabaseLease(database, LEASE, LEASE_S)
        self._ticker = Ticker(LEASE, self.tick, EVERY_S)

    def start(self) -> None:
        """Begin to look, where there is a mail server."""
        if self._settings.smtp_host is not None:
            self._ticker.start()

    def stop(self) -> None:
        """End the thread and give the lease back; what is being sent is waited for."""
        self._ticker.stop()
        self._lease.give_back()

    def tick(self) -> None:
        """Send what is due."""
        if not self._database.finds(repository.HAS_MAILS):
            return
        with self._database.read() as session:
            mails = repository.mails_due(session, utc_now(), AT_ONCE)
        for mail in mails:
            if self._ticker.stopping or not self._lease.hold():
                return
            sent = send(self._settings, mail)
            if not sent.taken:
                log.warning("the mail server did not take e-mail %s: %s", mail.id, sent.detail)
            with self._database.write() as session:
                _settle(session.get(AlertMail, mail.id, with_for_update=True), sent, utc_now())


def _settle(mail: AlertMail | None, sent: Sent, now: dt.datetime) -> None:
    """Note what became of a try; None where the route was deleted meanwhile."""
    if mail is None or mail.state != "pending":
        return
    mail.attempts += 1
    mail.last_detail = sent.detail[:1000]
    if sent.taken:
        mail.state, mail.finished_at = "sent", now
        return
    outcome = Outcome(None, sent.detail)
    later = None if sent.final else next_try(mail.attempts, outcome, now, mail.created_at + LIFETIME, random.random())
    if later is None:
        mail.state, mail.finished_at = "dead", now
    else:
        mail.next_at = later
