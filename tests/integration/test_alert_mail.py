"""E-mails of alerts, given to a real mail server on loopback: encrypted, tried again, given up, sent by one server."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fleet_server.alerts.mail import AlertMailer
from fleet_server.alerts.schemas import RouteCreate
from fleet_server.alerts.service import create_route, route_detail, send_test
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.errors import InvalidError
from fleet_server.models import AlertMail, AlertRoute
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.settings import Settings
from fleet_server.webhooks import schedule
from tests.fleet import free_port
from tests.mail_sink import MailSink, mail_sink, server_context

TO = ["ops@example.org", "night@example.org"]


@pytest.fixture
def sink() -> Iterator[MailSink]:
    with mail_sink() as found:
        yield found


def settings(port: int, **more: Any) -> Settings:
    given = {"smtp_host": "127.0.0.1", "smtp_port": port, "smtp_from": "shoal@example.org", "smtp_security": "none"}
    return Settings(**{**given, **more})


def write(database: Database, found: Settings) -> str:
    """A test notice of a new route; returns the e-mail's id."""
    with database.write() as session:
        route = session.query(AlertRoute).first()
        wanted = RouteCreate.model_validate({"name": "pager", "kind": "email", "to": TO})
        route = route or create_route(session, found, DEFAULT_FLEET, wanted, actor="test")
        send_test(session, route, actor="test")
        return max(one.id for one in session.query(AlertMail))


def mail(database: Database, mail_id: str) -> AlertMail:
    with database.read() as session:
        return session.get_one(AlertMail, mail_id)


def send(database: Database, found: Settings) -> None:
    mailer = AlertMailer(database, found)
    mailer.tick()
    mailer.stop()


def due_now(database: Database) -> None:
    with database.write() as session:
        session.query(AlertMail).filter_by(state="pending").update({"next_at": utc_now()})


def test_an_email_says_where_it_comes_from_and_goes_to_all_of_a_route(database: Database, sink: MailSink) -> None:
    found = settings(sink.port)
    mail_id = write(database, found)
    send(database, found)
    assert (mail(database, mail_id).state, mail(database, mail_id).attempts) == ("sent", 1)
    message = sink.got[0]
    assert sink.recipients == [TO]
    assert message["From"] == "shoal@example.org"
    assert message["To"] == ", ".join(TO)
    assert message["Subject"] == "[shoal default] a test of alerts"
    assert message["Message-ID"] == f"<{mail_id}@example.org>"
    assert message["Auto-Submitted"] == "auto-generated"
    assert "they come by this way" in message.get_content()
    send(database, found)
    assert len(sink.got) == 1


def test_by_starttls_with_a_login(database: Database, tmp_path: Path) -> None:
    context, ca = server_context(tmp_path)
    with mail_sink(context) as sink:
        login = {"smtp_user": "shoal", "smtp_password": "right", "smtp_security": "starttls"}
        found = settings(sink.port, smtp_ca=ca, **login)
        mail_id = write(database, found)
        send(database, found)
        assert mail(database, mail_id).state == "sent"
        assert sink.logins == [("shoal", "right", True)]
        assert sink.encrypted == [True]
        stranger = settings(sink.port, **login)
        mail_id = write(database, stranger)
        send(database, stranger)
        assert mail(database, mail_id).state == "pending"
        assert "CERTIFICATE_VERIFY_FAILED" in mail(database, mail_id).last_detail
        assert len(sink.logins) == 1, "nothing was said to who could not prove to be it"


def test_where_starttls_is_wanted_nothing_is_sent_without(database: Database, sink: MailSink) -> None:
    found = settings(sink.port, smtp_security="starttls")
    mail_id = write(database, found)
    send(database, found)
    assert (mail(database, mail_id).state, sink.got) == ("pending", [])


def test_what_is_not_taken_is_tried_again_and_comes_with_the_same_id(
    database: Database, sink: MailSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "FIRST_S", 3600.0)
    found, away = settings(sink.port), settings(free_port())
    mail_id = write(database, found)
    send(database, away)
    assert "refused" in mail(database, mail_id).last_detail
    assert mail(database, mail_id).next_at > utc_now() + dt.timedelta(minutes=30)
    send(database, found)
    assert sink.got == [], "it is not due"
    due_now(database)
    sink.reply = lambda line: "451 later" if line == "data" else None
    send(database, found)
    assert "451 later" in mail(database, mail_id).last_detail
    sink.reply = lambda _: None
    due_now(database)
    send(database, found)
    assert (mail(database, mail_id).state, mail(database, mail_id).attempts) == ("sent", 3)
    assert sink.got[0]["Message-ID"] == f"<{mail_id}@example.org>"


def test_who_is_not_known_there_is_no_reason_to_try_again_and_is_named(database: Database, sink: MailSink) -> None:
    found = settings(sink.port)
    sink.reply = lambda line: "550 no such user" if "night@" in line else None
    one = write(database, found)
    send(database, found)
    assert sink.recipients == [[TO[0]]]
    assert mail(database, one).state == "sent"
    assert "night@example.org: 550 no such user" in mail(database, one).last_detail
    sink.reply = lambda line: "550 no such user" if line.startswith("rcpt") else None
    two = write(database, found)
    send(database, found)
    assert mail(database, two).state == "dead"
    with database.read() as session:
        shown = route_detail(session, session.query(AlertRoute).one())
    assert (shown.waiting, shown.dead) == (0, 1)
    assert "550" in shown.last_detail


def test_after_a_day_it_is_given_up(database: Database) -> None:
    away = settings(free_port())
    mail_id = write(database, away)
    with database.write() as session:
        session.get_one(AlertMail, mail_id).created_at = utc_now() - dt.timedelta(hours=24)
    send(database, away)
    assert mail(database, mail_id).state == "dead"


def test_of_two_servers_one_sends(database: Database, sink: MailSink) -> None:
    found = settings(sink.port)
    first, second = AlertMailer(database, found), AlertMailer(database, found)
    write(database, found)
    first.tick()
    write(database, found)
    second.tick()
    assert len(sink.got) == 1
    first.stop()
    second.tick()
    assert len(sink.got) == 2


def test_what_is_set_must_be_whole(database: Database) -> None:
    for wrong, said in (
        ({"smtp_host": "mail"}, "SHOAL_SMTP_FROM"),
        ({"smtp_user": "u"}, "SHOAL_SMTP_PASSWORD"),
        ({"smtp_host": "mail", "smtp_from": "a@b", "smtp_user": "u", "smtp_password": "p", "smtp_security": "none"},
         "SHOAL_SMTP_SECURITY"),
        ({"smtp_ca": "/nowhere.pem"}, "SHOAL_SMTP_CA"),
    ):  # fmt: skip
        with pytest.raises(ValidationError, match=said):
            Settings(**wrong)
    wanted = RouteCreate.model_validate({"name": "pager", "kind": "email", "to": TO})
    with database.write() as session, pytest.raises(InvalidError, match="SHOAL_SMTP_HOST"):
        create_route(session, Settings(), DEFAULT_FLEET, wanted, actor="test")
    assert "right" not in repr(settings(1, smtp_user="shoal", smtp_password="right"))
