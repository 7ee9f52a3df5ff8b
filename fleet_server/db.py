"""The database: one engine, two kinds of session. Sync SQLAlchemy on SQLite (WAL) or PostgreSQL.

`write()` takes SQLite's write lock when it begins (BEGIN IMMEDIATE), so that a transaction never fails half way
because another one wrote; it commits once, at its end. `read()` never writes. Code in services gets a session and
commits nothing.

SQLite lets one transaction write and gives the lock to whoever happens to ask at the right moment: a thread that writes
often can keep another from ever writing. So the threads of this process take turns before they ask for it.
"""

from __future__ import annotations

import datetime as dt
import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, TypeVarTuple

import msgspec
import psycopg
from sqlalchemy import (
    ColumnElement,
    DateTime,
    Dialect,
    Engine,
    MetaData,
    Row,
    Select,
    and_,
    create_engine,
    event,
    literal_column,
    tuple_,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import DeclarativeBase, InstrumentedAttribute, Session
from sqlalchemy.types import JSON, TypeDecorator
from uuid_utils import uuid7

from fleet_server import spans
from fleet_server.loop_reads import LoopReads
from fleet_server.turns import Turns

BUSY_TIMEOUT_S = 30.0
PIECE = 500  # values of one query
# What is raised while the database does not work, whatever it was asked: the same may be asked again later.
UNAVAILABLE = (OperationalError, InterfaceError, psycopg.OperationalError)
ValueT = TypeVar("ValueT")
EntityT = TypeVar("EntityT")
ColumnTs = TypeVarTuple("ColumnTs")

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


def new_id() -> str:
    """A time-ordered unique id (UUID version 7, RFC 9562) as text: ids sort as they were made."""
    return str(uuid7())


def pieces(values: Sequence[ValueT], size: int = PIECE) -> Iterator[Sequence[ValueT]]:
    """Values in the order given, as many at a time as a query takes well."""
    return (values[start : start + size] for start in range(0, len(values), size))


def rows_by(
    session: Session, query: Select[*ColumnTs], column: InstrumentedAttribute[Any], values: Sequence[object]
) -> Iterator[Row[*ColumnTs]]:
    """What a query finds where a column is one of these values, however many.

    They are asked for a piece at a time, in the order given: what the query says of order holds within a piece.
    """
    for piece in pieces(values):
        yield from session.execute(query.where(column.in_(piece)))


def scalars_by(
    session: Session, query: Select[EntityT], column: InstrumentedAttribute[Any], values: Sequence[object]
) -> Iterator[EntityT]:
    """As `rows_by`, for a query of one kind of row or one column."""
    for piece in pieces(values):
        yield from session.scalars(query.where(column.in_(piece)))


def rows_in(columns: Sequence[InstrumentedAttribute[Any]], values: Sequence[Sequence[Any]]) -> ColumnElement[bool]:
    """Whether columns together are one of these tuples.

    The first column is asked for by itself too: by that SQLite finds rows in an index that begins with it. For tuples
    alone it reads the whole table.
    """
    firsts = sorted({one[0] for one in values})
    return and_(columns[0].in_(firsts), tuple_(*columns).in_(values))


def question(query: Select[Any]) -> str:
    """A statement for `Database.finds`: one row of what a query finds, whose values are numbers and texts."""
    one: Select[Any] = query.with_only_columns(literal_column("1"), maintain_column_froms=True).limit(1)
    return str(one.compile(compile_kwargs={"literal_binds": True}))


class UtcDateTime(TypeDecorator[dt.datetime]):
    """A point in time, always in UTC; SQLite would forget the zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    @property
    def python_type(self) -> type[dt.datetime]:
        """What values of it are."""
        return dt.datetime

    def process_bind_param(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:  # noqa: ARG002
        """To the database; refuses a time without a zone."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone can't be stored")
        return value.astimezone(dt.UTC)

    def process_result_value(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:  # noqa: ARG002
        """From the database."""
        if value is None:
            return None
        return value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)


class Base(DeclarativeBase):
    """Base of every table."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {  # noqa: RUF012
        dt.datetime: UtcDateTime(),
        dict[str, Any]: JSON(none_as_null=True),
        list[Any]: JSON(none_as_null=True),
    }


def _read_json(text: str | bytes) -> Any:
    """A value of a JSON column, as fast as can be; what only Python takes for JSON (`NaN`), as Python does."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return json.loads(text)


@contextmanager
def savepoint(session: Session) -> Iterator[None]:
    """What is done within is undone alone when the block raises, with what it left to be done at the commit."""
    waiting = {key: len(value) for key, value in session.info.items() if isinstance(value, list)}
    try:
        with session.begin_nested():
            yield
    except BaseException:
        for key, value in session.info.items():
            if isinstance(value, list):
                del value[waiting.get(key, 0) :]
        raise


class Database:
    """Engine and sessions.

    Args:
        url: SQLAlchemy URL of SQLite or PostgreSQL.
        export: takes the spans of what was committed; None where nothing is traced.
        owner: in whose name leases are taken by it; None for a new name each.

    Attributes:
        reads: asks PostgreSQL from the event loop.
    """

    def __init__(self, url: str, export: spans.Sink | None = None, owner: str | None = None) -> None:
        self.url = url
        self.owner = owner
        self._export = export
        self.is_sqlite = make_url(url).get_backend_name() == "sqlite"
        self._engine = (
            _sqlite_engine(url)
            if self.is_sqlite
            else create_engine(url, pool_pre_ping=True, pool_size=20, json_deserializer=_read_json)
        )
        self._writing = self._engine.execution_options(shoal_write=True)
        self._of_thread = threading.local()
        self._drivers: list[Any] = []  # of all threads
        self._asking = threading.Lock()
        self._asker: Any = None  # the one connection of `finds`, for all threads
        self.reads = LoopReads(self._own_connection)
        self._turns: AbstractContextManager[object] = Turns() if self.is_sqlite else nullcontext()

    @property
    def engine(self) -> Engine:
        """For migrations and health checks."""
        return self._engine

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction: committed when the block ends, rolled back when it raises."""
        with self._turns, Session(self._writing, expire_on_commit=False) as session, session.begin():
            yield session
        if self._export is not None and (noted := spans.noted(session)):
            self._export(noted)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that only reads."""
        with Session(self._engine, expire_on_commit=False, autoflush=False) as session:
            yield session

    def _own_connection(self) -> Any:
        """A connection of the raw driver, beside SQLAlchemy and its pool, for who closes it.

        On PostgreSQL every statement is a transaction.
        """
        pooled = self._engine.raw_connection()
        connection: Any = pooled.driver_connection
        pooled.detach()
        if isinstance(connection, psycopg.Connection):
            connection.rollback()
            connection.autocommit = True
        return connection

    @contextmanager
    def driver(self) -> Iterator[Any]:
        """This thread's connection of the raw driver, for single statements that read and are asked all the time.

        Beside SQLAlchemy and its pool; one that has failed is replaced. On SQLite it waits for nobody: who reads by
        it would stand still where all other requests come by.
        """
        connection: Any = getattr(self._of_thread, "driver", None)
        if connection is None:
            connection = self._of_thread.driver = self._reader()
            self._drivers.append(connection)
        try:
            yield connection
        except BaseException:
            self._of_thread.driver = None
            self._drivers.remove(connection)
            connection.close()
            raise

    def finds(self, statement: str) -> bool:
        """Whether a `question` finds something, by the raw driver: for what is asked all the time, and is seldom so.

        True, too, where it can't be asked: who then looks the ordinary way is told what is wrong.
        """
        with self._asking:
            try:
                if self._asker is None:
                    self._asker = self._reader()
                return self._asker.execute(statement).fetchone() is not None
            except (sqlite3.Error, psycopg.Error, *UNAVAILABLE):
                self._ask_no_more()
                return True

    def _reader(self) -> Any:
        """A connection of the raw driver for statements that read and are asked again and again."""
        connection = self._own_connection()
        if isinstance(connection, psycopg.Connection):
            connection.prepare_threshold = 1
        else:
            connection.execute("PRAGMA busy_timeout=0")
        return connection

    def _ask_no_more(self) -> None:
        if self._asker is not None:
            self._asker.close()
            self._asker = None

    def dispose(self) -> None:
        """Close every connection."""
        self.reads.close()
        with self._asking:
            self._ask_no_more()
        self._engine.dispose()
        while self._drivers:
            self._drivers.pop().close()
        self._of_thread = threading.local()


def _sqlite_engine(url: str) -> Engine:
    arguments = {"timeout": BUSY_TIMEOUT_S, "check_same_thread": False}
    engine = create_engine(url, connect_args=arguments, json_deserializer=_read_json)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # we begin transactions ourselves, below
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "case_sensitive_like=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        writing = connection.get_execution_options().get("shoal_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine
