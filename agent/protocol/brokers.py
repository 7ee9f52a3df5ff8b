"""Where a broker is reached: one address, or several of a cluster, and which is tried next. Pure; both sides use it.

Written as `mqtt://[user:password@]host:port` or `mqtts://…`; several by commas, in the order in which they are tried.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

PORT, TLS_PORT = 1883, 8883
MOST = 16


@dataclass(frozen=True)
class BrokerAddresses:
    """One broker, or the nodes of one cluster.

    Attributes:
        tls: whether they are spoken to by TLS.
        places: host and port of each, in order; one at least.
        user: the same at all of them; None for none.
        password: the user's.
    """

    tls: bool
    places: tuple[tuple[str, int], ...]
    user: str | None = None
    password: str | None = None


def read_brokers(text: str) -> BrokerAddresses:
    """The addresses that a text names. Errors do not repeat it, for it may hold a password.

    Raises:
        ValueError: when it names none, or addresses that don't go together.
    """
    urls = [one.strip() for one in text.split(",")]
    if len(urls) > MOST:
        raise ValueError(f"there are {len(urls)} addresses, and at most {MOST} may be")
    schemes, users, places = set(), set(), []
    for url in urls:
        try:
            parts = urlsplit(url)
            usable = parts.scheme in {"mqtt", "mqtts"} and parts.hostname and parts.port != 0
            port = parts.port or (TLS_PORT if parts.scheme == "mqtts" else PORT)
        except ValueError:
            usable = None
        if not usable:
            raise ValueError("it is not mqtt://host:port or mqtts://host:port, or several of them by commas")
        schemes.add(parts.scheme)
        users.add((parts.username, parts.password))
        places.append((parts.hostname or "", port))
    if len(schemes) > 1 or len(users) > 1:
        raise ValueError("its addresses are of one cluster: let all have the same scheme, user and password")
    user, password = users.pop()
    known = tuple(dict.fromkeys(places))
    return BrokerAddresses(
        schemes == {"mqtts"}, known, unquote(user) if user else None, unquote(password or "") if user else None
    )


def without_credentials(text: str) -> str:
    """The same addresses with neither user nor password."""
    found = read_brokers(text)
    scheme = "mqtts" if found.tls else "mqtt"
    return ",".join(f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}" for host, port in found.places)


class BrokerChoice:
    """Which address is connected to next: the first; after a failure the one after it, and so round.

    A connection that was accepted and then lost begins again with the first, where the operator wants it to be.

    Args:
        brokers: the addresses.
        start: which of them is this one's first, modulo how many there are.
        longest_s: the longest pause between two rounds.
    """

    def __init__(self, brokers: BrokerAddresses, *, start: int = 0, longest_s: int = 60) -> None:
        self._places = brokers.places
        self._start = start % len(brokers.places)
        self._longest_s = longest_s
        self._failures = 0
        self._accepted = False

    @property
    def place(self) -> tuple[str, int]:
        """Host and port to connect to now."""
        return self._places[(self._start + self._failures) % len(self._places)]

    @property
    def pause_s(self) -> int:
        """Seconds to wait before that: one within a round, twice as many after each round."""
        rounds, within = divmod(self._failures, len(self._places))
        return 1 if within else min(1 << min(rounds, 16), self._longest_s)

    def accepted(self) -> None:
        """The broker has accepted the connection."""
        self._accepted = True

    def ended(self) -> bool:
        """There is no connection, or none was made; returns whether to connect elsewhere than before."""
        before = self.place
        self._failures = 0 if self._accepted else self._failures + 1
        self._accepted = False
        return self.place != before
