"""Who was let in a moment ago: for how long, and until somebody may have changed it."""

from __future__ import annotations

from fleet_server.access.authentication import Proof
from fleet_server.access.known import KEPT_S, MOST, KnownPrincipals
from fleet_server.access.oidc import OIDC_PREFIX
from fleet_server.principals import Principal, Role

ADA = Principal("user/1", "user/ada", Role.VIEWER, "default")
PROOF = Proof("Bearer x", None)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_it_is_believed_for_a_while() -> None:
    clock = Clock()
    known = KnownPrincipals(clock)
    assert known.get(PROOF) is None
    known.keep(PROOF, ADA, known.forgotten)
    clock.now = KEPT_S - 0.01
    assert known.get(PROOF) == ADA
    assert known.get(Proof("Bearer x", "default")) is None, "another fleet is another question"
    assert known.get(Proof("Bearer y", None)) is None
    clock.now = KEPT_S
    assert known.get(PROOF) is None


def test_what_the_database_said_before_a_change_is_not_kept() -> None:
    known = KnownPrincipals(Clock())
    asked = known.forgotten
    known.forget()
    known.keep(PROOF, ADA, asked)
    assert known.get(PROOF) is None
    known.keep(PROOF, ADA, known.forgotten)
    known.forget()
    assert known.get(PROOF) is None


def test_a_token_of_the_openid_provider_is_never_believed_unchecked() -> None:
    known = KnownPrincipals(Clock())
    known.keep(PROOF, Principal(f"{OIDC_PREFIX}0", "oidc/ada#0", Role.VIEWER, "default"), known.forgotten)
    assert known.get(PROOF) is None


def test_it_is_bounded() -> None:
    known = KnownPrincipals(Clock())
    for number in range(MOST + 1):
        known.keep(Proof(f"Bearer {number}", None), ADA, known.forgotten)
    assert known.get(Proof("Bearer 0", None)) is None
    assert known.get(Proof(f"Bearer {MOST}", None)) == ADA
