"""The servers of one database: each has a number while it lives, and what all must have in common is compared.

A number stands for the server at the broker (`shoal-server`, `shoal-server-2`, …): whoever has it next takes over the
session there, so that none is left behind that messages would gather in.
"""

from __future__ import annotations

import datetime as dt
import logging
import socket
from dataclasses import dataclass

from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from agent import __version__
from fleet_server.clock import utc_now
from fleet_server.db import Database, new_id
from fleet_server.errors import UnavailableError
from fleet_server.models import Server
from fleet_server.seat import MOST_SERVERS

log = logging.getLogger(__name__)
LEASE = dt.timedelta(seconds=10)
TRIES = 5


@dataclass(frozen=True)
class Common:
    """What servers of one database must have in common, besides it.

    Attributes:
        ca: SHA-256 of the public key of the fleet's CA.
        artifacts: URL of the artifact store.
        broker: whether they share one; an embedded broker is one server's own.
    """

    ca: str = ""
    artifacts: str = ""
    broker: bool = True

    @property
    def text(self) -> str:
        """To compare, a line each."""
        return f"ca {self.ca}\nartifacts {self.artifacts}\nbroker {'shared' if self.broker else 'embedded'}"


class Membership:
    """This server among those of its database.

    Args:
        database: that they share.
        name: of this server: the same at each start, and nobody else's while it runs.
        common: what it brings.
    """

    def __init__(self, database: Database, name: str | None = None, common: Common | None = None) -> None:
        self._database = database
        self.name = name or new_id()
        self._common = common or Common()
        self.number = 1

    def join(self) -> None:
        """Take a number: the one it had, or the lowest that is free.

        Raises:
            UnavailableError: when it can't work beside those that live, or there are too many.
        """
        for tries in range(TRIES):
            try:
                with self._database.write() as session:
                    self._join(session)
            except IntegrityError:  # another took the number in this moment
                if tries == TRIES - 1:
                    raise
            else:
                return

    def _join(self, session: Session) -> None:
        now = utc_now()
        rows = {one.number: one for one in session.scalars(select(Server).order_by(Server.number).with_for_update())}
        others = [one for one in rows.values() if one.name != self.name and one.until > now]
        for one in others:
            self._check(one)
        taken = {one.number for one in others}
        had = next((one.number for one in rows.values() if one.name == self.name), None)
        number = had or next((number for number in range(1, MOST_SERVERS + 1) if number not in taken), None)
        if number is None:
            raise UnavailableError("servers", f"{MOST_SERVERS} servers work on this database already: stop one first")
        row = rows.get(number)
        if row is None:
            row = Server(number=number)
            session.add(row)
        row.name, row.host, row.version, row.shared = self.name, socket.gethostname(), __version__, self._common.text
        row.started_at, row.until = now, now + LEASE
        session.flush()
        self.number = number
        if others:
            known = ", ".join(f"{one.number} on {one.host} ({one.version})" for one in others)
            log.info("this is server %d; beside it: %s", number, known)

    def _check(self, other: Server) -> None:
        """Whether this one can work beside another."""
        where = f"server {other.number} on {other.host} works on this database"
        mine, theirs = (
            dict(line.split(" ", 1) for line in text.splitlines()) for text in (self._common.text, other.shared)
        )
        if "embedded" in {mine["broker"], theirs.get("broker")}:
            detail = (
                f"{where}, and one of the two has a broker of its own: give all the same SHOAL_BROKER_URL. If that one "
                f"ended, this one may start {LEASE.total_seconds():.0f} s after that"
            )
            raise UnavailableError("servers", detail)
        if mine["ca"] != theirs.get("ca"):
            detail = (
                f"{where} with another CA: give all the same SHOAL_CA_CERT and SHOAL_CA_KEY, or the same state folder"
            )
            raise UnavailableError("servers", detail)
        if mine["artifacts"] != theirs.get("artifacts"):
            detail = f"{where} with other artifacts: give all servers the same SHOAL_ARTIFACTS_URL, or state folder"
            raise UnavailableError("servers", detail)

    def renew(self, session: Session, now: dt.datetime) -> list[str]:
        """Stay a member; the names of all that live. One whose number was taken meanwhile takes another.

        Raises:
            UnavailableError: as `join` does.
        """
        mine = (Server.number == self.number, Server.name == self.name)
        if session.scalar(update(Server).where(*mine).values(until=now + LEASE).returning(Server.number)) is None:
            self._join(session)
        return self.living(session, now)

    def living(self, session: Session, now: dt.datetime) -> list[str]:
        """Names of the servers that live."""
        return list(session.scalars(select(Server.name).where(Server.until > now).order_by(Server.name)))

    def leave(self, session: Session, now: dt.datetime) -> None:
        """Be no member any more; the number stays this server's while nobody else needs it."""
        mine = (Server.number == self.number, Server.name == self.name)
        session.execute(update(Server).where(*mine).values(until=now))
