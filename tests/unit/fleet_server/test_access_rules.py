"""Access without I/O: who may do what, tokens, how often one may ask, how guessing is slowed down."""

from __future__ import annotations

import itertools
import stat
from pathlib import Path

import pytest

from fleet_server.access import policy, secret_tokens
from fleet_server.access.authentication import network_of
from fleet_server.access.bootstrap import FILE, bootstrap_token
from fleet_server.access.limits import GuessBrake
from fleet_server.access.passwords import hash_password, verify_password
from fleet_server.errors import FleetError, ForbiddenError, UnavailableError
from fleet_server.principals import Principal, Role
from fleet_server.rates import KEYS, KeyedBuckets
from tests.api_document import document


def principal(role: Role, *, server_wide: bool = False) -> Principal:
    return Principal("token/1", "token/t", role, "default", server_wide=server_wide)


def test_every_operation_below_the_api_has_a_declared_role_and_no_other_has() -> None:
    operations = {
        operation["operationId"]
        for path, item in document()["paths"].items()
        if path.startswith("/api/v1")
        for operation in item.values()
    }
    assert operations == set(policy.LEAST) | policy.PUBLIC
    assert not set(policy.LEAST) & policy.PUBLIC


def test_who_reads_needs_no_more_than_a_viewer_and_who_changes_needs_more() -> None:
    kinds = ("user", "token", "enrolment_token", "webhook", "alert_route")
    beyond_viewers = {name for one in kinds for name in (f"list_{one}s", f"show_{one}")} | {
        "list_deliveries",
        "show_delivery",
        "download_sample_set",
        "list_command_lines",
        "follow_command_log",
    }
    for path, item in document()["paths"].items():
        for method, operation in item.items():
            action = operation["operationId"]
            if not path.startswith("/api/v1") or action in policy.PUBLIC | {"logout"}:
                continue
            reads = method == "get" and action not in beyond_viewers
            assert (policy.LEAST[action] is Role.VIEWER) == reads, action


@pytest.mark.parametrize(("has", "needs"), list(itertools.product(Role, Role)))
def test_roles_include_those_before_them(has: Role, needs: Role) -> None:
    action = next(one for one, least in policy.LEAST.items() if least is needs and one not in policy.SERVER_WIDE)
    if list(Role).index(has) >= list(Role).index(needs):
        policy.check(principal(has), action)
    else:
        with pytest.raises(ForbiddenError) as refused:
            policy.check(principal(has), action)
        assert f"role {needs.value}" in refused.value.detail


def test_what_nobody_declared_nobody_may() -> None:
    with pytest.raises(FleetError) as refused:
        policy.check(principal(Role.ADMIN, server_wide=True), "a_new_endpoint")
    assert refused.value.code == "role_not_declared"
    with pytest.raises(ForbiddenError) as refused:
        policy.check(principal(Role.ADMIN), "create_fleet")
    assert refused.value.code == "server_wide_needed"


def test_tokens_hold_256_bits_and_only_their_hash_is_kept() -> None:
    minted = [secret_tokens.mint() for _ in range(50)]
    assert len({one.text for one in minted}) == 50
    for one in minted:
        parsed = secret_tokens.parse(one.text)
        assert parsed is not None
        assert parsed[0] == one.id
        assert len(parsed[1]) >= 43  # 32 bytes in base64
        assert secret_tokens.matches(parsed[1], one.digest)
        assert not secret_tokens.matches(parsed[1][:-1] + "!", one.digest)
        assert parsed[1] not in one.digest


@pytest.mark.parametrize(
    "text", ["", "shoal", "shoal_", "shoal_0123456789abcdef_", "x_0123456789abcdef_s", "shoal_1_s", "é"]
)
def test_what_is_no_token(text: str) -> None:
    assert secret_tokens.parse(text) is None


def test_passwords_are_hashed_by_argon2id() -> None:
    stored = hash_password("correct horse battery")
    assert stored.startswith("$argon2id$")
    assert verify_password(stored, "correct horse battery")
    assert not verify_password(stored, "correct horse")
    assert not verify_password(None, "correct horse battery")


def test_the_first_admin_token_is_its_owners_alone(tmp_path: Path) -> None:
    token = bootstrap_token(tmp_path)
    assert bootstrap_token(tmp_path) == token
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [tmp_path / FILE]
    (tmp_path / FILE).chmod(0o640)
    with pytest.raises(UnavailableError, match="others may read"):
        bootstrap_token(tmp_path)
    (tmp_path / FILE).chmod(0o600)
    (tmp_path / FILE).write_text("\n")
    with pytest.raises(UnavailableError, match="is empty"):
        bootstrap_token(tmp_path)


def test_a_flood_of_keys_is_bounded() -> None:
    buckets = KeyedBuckets(1, 1)
    brake = GuessBrake(free=1)
    for number in range(KEYS + 100):
        buckets.of(str(number), 0.0)
        brake.failed(str(number), 0.0)
    assert len(buckets._buckets) == KEYS
    assert len(brake._guesses) == KEYS


def test_guessing_gets_slower_and_success_clears_it() -> None:
    brake = GuessBrake(free=3, longest_s=10)
    waits = []
    for _ in range(8):
        brake.failed("ada", 0.0)
        waits.append(brake.wait_s("ada", 0.0))
    assert waits == [0, 0, 1, 2, 4, 8, 10, 10]
    assert brake.wait_s("ada", 4.0) == 6
    assert brake.wait_s("bob", 0.0) == 0
    brake.failed("ada", 5000.0)
    assert brake.wait_s("ada", 5000.0) == 0, "an hour later it begins anew"
    brake.failed("bob", 0.0)
    brake.succeeded("bob")
    assert "bob" not in brake._guesses


def test_an_ipv6_host_has_one_count_whatever_address_it_takes() -> None:
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:1") != network_of("2001:db8:0:1::1")
    assert network_of("192.0.2.1") != network_of("192.0.2.2")
    assert network_of("testclient") == "testclient"
