"""Windows in time zones, budgets under clocks that jump, rates: what a download may do when."""

from __future__ import annotations

import contextlib
import datetime as dt
from pathlib import Path
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config import load_config
from agent.errors import ConfigError
from agent.link import detect_link
from agent.protocol.codec import decode, encode
from agent.protocol.delivery import (
    Budget,
    DeliveryPolicy,
    Period,
    Waiting,
    WaitingFor,
    Window,
    read_budget,
    read_budgets,
    read_rate,
    read_size,
    read_window,
    window_text,
)
from agent.protocol.errors import WireError
from agent.protocol.facts import LinkFacts
from agent.protocol.manifest import manifest_bytes
from agent.protocol.messages import ChunkRange, DesiredDeployment, DesiredState, Need
from agent.protocol.topics import (
    DeviceTopic,
    broadcast_topic,
    device_topic,
    is_chunk_topic,
    parse_chunk_topic,
    repair_topic,
)
from agent.protocol.version import SPOKEN
from agent.update.budget import LENGTH_S, Ledger, index_of, period_end
from agent.update.download import WINDOW, Allowance
from agent.update.journal import Journal
from agent.update.pace import Memory, OwnLimits, Pacer
from agent.update.windows import opens_at
from agent.update.zones import zone_of
from tests.unit.agent.test_store_and_download import manifest as stored

BERLIN = ZoneInfo("Europe/Berlin")
CHUNK = 256 * 1024
CELLULAR = LinkFacts("cellular", metered=True, interface="wwan0")


def berlin(text: str, fold: int = 0) -> float:
    return dt.datetime.fromisoformat(text).replace(tzinfo=BERLIN, fold=fold).timestamp()


def opens(text: str, now: float) -> float | None:
    return opens_at((read_window(text),), now, lambda _: BERLIN)


class Kept:
    def __init__(self) -> None:
        self.numbers: dict[str, float] = {}

    def number(self, name: str, default: float) -> float:
        return self.numbers.get(name, default)

    def keep_number(self, name: str, value: float) -> None:
        self.numbers[name] = value


# -- how people write it


@pytest.mark.parametrize(
    ("text", "window"),
    [
        ("22:00-04:00", Window(tuple(range(7)), 1320, 240)),
        ("Mon-Fri 22:00-04:00 Europe/Berlin", Window((0, 1, 2, 3, 4), 1320, 240, "Europe/Berlin")),
        ("Sat,Sun 00:00-24:00", Window((5, 6), 0, 1440)),
        ("Fri-Mon 01:30-02:00 UTC", Window((0, 4, 5, 6), 90, 120, "UTC")),
    ],
)
def test_windows_are_read_and_written(text: str, window: Window) -> None:
    assert read_window(text) == window
    assert read_window(window_text(window)) == window


@pytest.mark.parametrize(
    "text", ["", "22:00", "24:00-01:00", "22:00-22:00", "25:00-26:00", "12:60-13:00", "Mo 22:00-23:00", "mon 1:00-2:00"]
)
def test_what_is_no_window_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"such as|from 00:00|00:00-24:00"):
        read_window(text)


def test_sizes_rates_and_budgets() -> None:
    assert read_size("1.5 GB") == 1_500_000_000
    assert read_rate("500 kB/s") == 500_000
    assert read_budget("50 MB per day") == Budget(50_000_000, Period.DAY)
    for wrong in ("50 MB", "50 per day", "0 MB per day", "50 MB per year", "-1 MB per day", "1e9 MB per day"):
        with pytest.raises(ValueError, match="is not a budget such as 50 MB per day"):
            read_budget(wrong)
    with pytest.raises(ValueError, match="at least 1 MB"):
        read_budget("500 kB per day")
    with pytest.raises(ValueError, match=r"satellite.*ethernet, wifi, cellular, metered"):
        read_budgets({"satellite": "1 MB per day"})
    with pytest.raises(ValueError, match="such as 500 kB/s"):
        read_rate("2 MB")


# -- windows


def test_a_window_over_midnight_belongs_to_the_day_it_begins_on() -> None:
    text = "Fri 22:00-04:00"
    assert opens(text, berlin("2026-11-27 21:59")) == berlin("2026-11-27 22:00")
    assert opens(text, berlin("2026-11-27 22:00")) == berlin("2026-11-27 22:00")
    assert opens(text, berlin("2026-11-28 03:59")) == berlin("2026-11-28 03:59")
    assert opens(text, berlin("2026-11-28 04:00")) == berlin("2026-12-04 22:00")


def test_the_first_of_several_windows_counts() -> None:
    windows = (read_window("Sun 10:00-11:00"), read_window("Wed 10:00-11:00"))
    assert opens_at(windows, berlin("2026-11-24 12:00"), lambda _: BERLIN) == berlin("2026-11-25 10:00")
    assert opens_at((), 5.0, lambda _: BERLIN) == 5.0


def test_clocks_that_go_forward_make_a_night_shorter() -> None:
    # On 29 March 2026 it is 03:00 one second after 01:59:59 in Berlin.
    text = "22:00-04:00"
    start, end = berlin("2026-03-28 22:00"), berlin("2026-03-29 04:00")
    assert end - start == 5 * 3600
    assert opens(text, end - 1) == end - 1
    assert opens(text, end) == berlin("2026-03-29 22:00")


def test_a_window_in_the_hour_that_is_left_out_is_as_long_as_ever() -> None:
    now = berlin("2026-03-29 00:00")
    at = opens("02:15-02:45", now)
    assert at is not None
    assert opens("02:15-02:45", at + 29 * 60) == at + 29 * 60
    assert opens("02:15-02:45", at + 30 * 60) == berlin("2026-03-30 02:15")
    at = opens("02:30-03:15", now)
    assert at is not None
    assert at < berlin("2026-03-29 03:15")


def test_clocks_that_go_back_open_a_window_once() -> None:
    # On 25 October 2026 the hour from 02:00 comes twice in Berlin.
    first, second = berlin("2026-10-25 02:15"), berlin("2026-10-25 02:15", fold=1)
    assert second - first == 3600
    assert opens("02:15-02:45", first) == first
    assert opens("02:15-02:45", second) == berlin("2026-10-26 02:15")


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=3, unique=True),
    st.integers(0, 1439),
    st.integers(1, 1440),
    st.integers(int(berlin("2026-01-01")), int(berlin("2027-01-01"))),
)
def test_a_window_always_opens_again_within_days(days: list[int], start: int, end: int, now: int) -> None:
    if start == end:
        return
    window = Window(tuple(days), start, end)
    at = opens_at((window,), float(now), lambda _: BERLIN)
    assert at is not None
    assert now <= at <= now + 8 * 86_400
    assert opens_at((window,), at, lambda _: BERLIN) == at


# -- budgets


@pytest.mark.parametrize("per", list(Period))
@given(wall=st.integers(int(berlin("2026-01-01")), int(berlin("2028-01-01"))))
def test_a_period_ends_where_the_next_begins(per: Period, wall: int) -> None:
    end = period_end(per, wall, BERLIN)
    assert wall < end <= wall + LENGTH_S[per] + 3600
    assert index_of(per, end - 1, BERLIN) == index_of(per, wall, BERLIN)
    assert index_of(per, end, BERLIN) == index_of(per, wall, BERLIN) + 1


def left(ledger: Ledger, budget: Budget, now: float, wall: float) -> float:
    return ledger.left("cellular", budget, now, wall)[0]


def test_a_clock_that_jumps_back_gives_no_budget_twice() -> None:
    kept, budget, noon = Kept(), Budget(10_000_000, Period.DAY), berlin("2026-11-25 12:00")
    ledger = Ledger(kept, BERLIN)
    ledger.add("cellular", budget, 9_000_000, 0.0, noon)
    assert left(ledger, budget, 1.0, noon + 1) == 1_000_000
    assert left(ledger, budget, 2.0, noon - 86_400) == 1_000_000
    assert left(ledger, budget, 3.0, noon + 2) == 1_000_000
    assert left(ledger, budget, 4.0, noon + 86_400) == 10_000_000
    assert left(ledger, budget, 5.0, noon) == 10_000_000
    ledger.add("cellular", budget, 9_000_000, 6.0, noon)
    assert left(ledger, budget, 7.0, noon + 86_400) == 1_000_000
    again = Ledger(kept, BERLIN)
    assert left(again, budget, 0.0, noon) <= 1_000_000


def test_a_clock_that_was_far_ahead_holds_nothing_up_for_ever() -> None:
    kept, budget, noon = Kept(), Budget(10_000_000, Period.DAY), berlin("2026-11-25 12:00")
    ledger = Ledger(kept, BERLIN)
    ledger.add("cellular", budget, 10_000_000, 0.0, berlin("2099-01-01"))
    assert left(ledger, budget, 1.0, noon) == 0
    _, again = ledger.left("cellular", budget, 3600.0, noon + 3600)
    assert again == pytest.approx(noon + 86_400, abs=2)
    assert left(ledger, budget, 86_390.0, noon + 86_390) == 0
    assert left(ledger, budget, 86_401.0, noon + 86_401) == 10_000_000


def test_a_day_of_25_hours_gives_its_budget_once() -> None:
    budget, start = Budget(10_000_000, Period.DAY), berlin("2026-10-25 00:00")
    ledger = Ledger(Kept(), BERLIN)
    ledger.add("cellular", budget, 10_000_000, 0.0, start)
    assert left(ledger, budget, 24.5 * 3600, start + 24.5 * 3600) == 0
    assert left(ledger, budget, 25 * 3600, start + 25 * 3600) == 10_000_000


@given(
    st.lists(st.tuples(st.integers(1, 400_000), st.floats(-200_000, 200_000), st.booleans()), min_size=1, max_size=60)
)
def test_a_crash_never_forgets_bytes_and_no_period_is_given_twice(steps: list[tuple[int, float, bool]]) -> None:
    kept, budget = Kept(), Budget(5_000_000, Period.DAY)
    ledger, now, wall = Ledger(kept, BERLIN), 0.0, berlin("2026-06-01 12:00")
    used: dict[float, int] = {}
    newest = 0.0
    for size, jump, crash in steps:
        now, wall = now + 60, wall + jump
        newest = max(newest, index_of(Period.DAY, wall, BERLIN))
        ledger.add("cellular", budget, size, now, wall)
        used[newest] = used.get(newest, 0) + size
        if crash:
            ledger, now = Ledger(kept, BERLIN), 0.0
        assert left(ledger, budget, now, wall) <= budget.bytes - used[newest]


def test_the_journal_keeps_budgets(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    ledger = Ledger(journal, dt.UTC)
    ledger.add("cellular", Budget(10_000_000, Period.MONTH), 3_000_000, 0.0, 1e9)
    ledger.close()
    journal.close()
    again = Ledger(Journal(tmp_path / "journal.db"), dt.UTC)
    assert left(again, Budget(10_000_000, Period.MONTH), 0.0, 1e9) == 7_000_000


# -- all together


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_a_metered_device_stops_before_its_budget_says_so_and_goes_on_in_the_next_period() -> None:
    clock = Clock(berlin("2026-11-25 12:00"))
    pacer = Pacer(Ledger(Memory(), BERLIN), OwnLimits(budgets=read_budgets({"cellular": "50 MB per day"})), clock=clock)
    policy = DeliveryPolicy(budgets=read_budgets({"metered": "100 MB per day"}))
    pacer.set_link(CELLULAR)
    came, alone = 0, False
    while isinstance(allowed := pacer.download(policy, CHUNK, 0.0), Allowance):
        alone = alone or allowed.alone
        assert allowed.window >= 1
        assert not alone or allowed.window * CHUNK <= 50_000_000 - came
        pacer.received(CHUNK, 0.0)
        came += CHUNK
    assert alone
    assert 50_000_000 - CHUNK < came <= 50_000_000
    assert allowed.reason is WaitingFor.BUDGET
    assert allowed.until == berlin("2026-11-26 00:00")
    assert "50 MB per day over cellular links" in allowed.detail
    pacer.set_link(LinkFacts("wifi"))
    assert isinstance(pacer.download(policy, CHUNK, 1.0), Allowance)
    pacer.set_link(CELLULAR)
    assert isinstance(pacer.download(policy, CHUNK, 1.0), Waiting)
    clock.now = berlin("2026-11-26 00:00")
    assert pacer.download(policy, CHUNK, 2.0) == Allowance(WINDOW)


def test_what_comes_over_a_link_without_budget_is_not_counted_for_another() -> None:
    pacer = Pacer(own=OwnLimits(budgets=read_budgets({"cellular": "1 MB per hour"})))
    pacer.set_link(LinkFacts("ethernet"))
    assert pacer.download(DeliveryPolicy(), CHUNK, 0.0) == Allowance(WINDOW)
    pacer.received(100_000_000, 0.0)
    pacer.set_link(CELLULAR)
    assert isinstance(pacer.download(DeliveryPolicy(), CHUNK, 0.0), Allowance)


def test_a_rate_bounds_what_may_be_in_flight_and_what_comes_in_the_long_run() -> None:
    pacer, policy = Pacer(), DeliveryPolicy(rate=CHUNK * 4)
    now, came = 0.0, 0
    for _ in range(1000):
        now += 0.05
        allowed = pacer.download(policy, CHUNK, now)
        assert isinstance(allowed, Allowance)
        assert allowed.window <= 4
        assert not allowed.alone
        if allowed.window:
            pacer.received(CHUNK, now)
            came += CHUNK
        else:
            assert 0 < allowed.rest_s <= 0.25
    assert came / now == pytest.approx(CHUNK * 4, rel=0.05)


def test_a_device_that_must_be_slower_than_its_fleet_fetches_alone() -> None:
    pacer = Pacer(own=OwnLimits(rate=CHUNK))
    slow = pacer.download(DeliveryPolicy(rate=CHUNK * 4), CHUNK, 0.0)
    assert isinstance(slow, Allowance)
    assert slow.alone
    same = pacer.download(DeliveryPolicy(rate=CHUNK), CHUNK, 0.0)
    assert isinstance(same, Allowance)
    assert not same.alone


def test_windows_hold_downloads_and_activation_apart() -> None:
    clock = Clock(berlin("2026-11-25 12:00"))
    pacer = Pacer(zones=lambda name: zone_of(name) if name else BERLIN, clock=clock)
    policy = DeliveryPolicy(
        download=(read_window("11:00-13:00"),), activate=(read_window("02:00-03:00 Europe/Berlin"),)
    )
    assert isinstance(pacer.download(policy, CHUNK, 0.0), Allowance)
    held = pacer.activation(policy)
    assert held is not None
    assert (held.reason, held.until) == (WaitingFor.ACTIVATE_WINDOW, berlin("2026-11-26 02:00"))
    clock.now = berlin("2026-11-26 02:30")
    waiting = pacer.download(policy, CHUNK, 0.0)
    assert isinstance(waiting, Waiting)
    assert (waiting.reason, waiting.until) == (WaitingFor.DOWNLOAD_WINDOW, berlin("2026-11-26 11:00"))
    assert pacer.activation(policy) is None


def test_a_zone_that_the_device_does_not_know_is_said_and_nothing_is_fetched() -> None:
    pacer = Pacer(zones=zone_of)
    waiting = pacer.download(DeliveryPolicy(download=(Window((0,), 0, 1, "Mars/Olympus"),)), CHUNK, 0.0)
    assert isinstance(waiting, Waiting)
    assert waiting.reason is WaitingFor.TIME_ZONE
    assert "tzdata" in waiting.detail


# -- the link


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


ROUTE = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"


@pytest.mark.parametrize(
    ("interface", "uevent", "kind"),
    [
        ("eth0", "INTERFACE=eth0\n", "ethernet"),
        ("wlan0", "DEVTYPE=wlan\nINTERFACE=wlan0\n", "wifi"),
        ("wwan0", "DEVTYPE=wwan\nINTERFACE=wwan0\n", "cellular"),
        ("ppp0", "INTERFACE=ppp0\n", "cellular"),
    ],
)
def test_the_link_is_that_of_the_default_route(tmp_path: Path, interface: str, uevent: str, kind: str) -> None:
    lines = [
        "eth9\t0000A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0",
        "eth8\t00000000\t0100A8C0\t0003\t0\t0\t700\t00000000\t0\t0\t0",
        f"{interface}\t00000000\t0100A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0",
    ]
    write(tmp_path, "proc/net/route", ROUTE + "\n".join(lines) + "\n")
    write(tmp_path, f"sys/class/net/{interface}/uevent", uevent)
    write(tmp_path, f"sys/class/net/{interface}/type", "1\n")
    assert detect_link(root=tmp_path) == LinkFacts(kind, metered=kind == "cellular", interface=interface)


def test_the_configuration_says_what_the_kernel_does_not(tmp_path: Path) -> None:
    assert detect_link(root=tmp_path) == LinkFacts("unknown")
    assert detect_link("cellular", root=tmp_path) == LinkFacts("cellular", metered=True)
    assert detect_link("ethernet", metered=True, root=tmp_path) == LinkFacts("ethernet", metered=True)
    v6 = f"{'0' * 32} 00 {'0' * 32} 00 {'f' * 32} 00000400 00000001 00000000 00000003 wlan1\n"
    write(tmp_path, "proc/net/ipv6_route", v6)
    write(tmp_path, "sys/class/net/wlan1/phy80211/name", "phy0")
    assert detect_link(root=tmp_path) == LinkFacts("wifi", interface="wlan1")


def test_the_link_table_of_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    text = f'device_id = "d"\nstate_dir = "{tmp_path}"\ntime_zone = "Europe/Berlin"\n[link]\ntype = "cellular"\n'
    file.write_text(text + 'rate = "1 MB/s"\n[link.budgets]\ncellular = "50 MB per day"\n')
    config = load_config(file, {})
    assert (config.link_type, config.link_metered, config.time_zone) == ("cellular", None, "Europe/Berlin")
    assert config.own_limits == OwnLimits(1_000_000, {"cellular": (Budget(50_000_000, Period.DAY),)})
    for line, remedy in (
        ('type = "satellite"', "link.type"),
        ("metered = 1", "link.metered"),
        ('budgets = { cellular = "lots" }', "50 MB per day"),
        ("speed = 1", "must be a table"),
    ):
        file.write_text(f'device_id = "d"\nstate_dir = "{tmp_path}"\n[link]\n{line}\n')
        with pytest.raises(ConfigError, match=remedy):
            load_config(file, {})
    with pytest.raises(ConfigError, match="time_zone"):
        load_config(None, {"SHOAL_AGENT_TIME_ZONE": "Mars/Olympus", "SHOAL_AGENT_STATE_DIR": str(tmp_path)})
    variables = {"SHOAL_AGENT_LINK": '{ type = "wifi", metered = true }', "SHOAL_AGENT_STATE_DIR": str(tmp_path)}
    assert load_config(None, variables).link_metered is True


# -- what comes over the wire

MON = Window((0,), 0, 60)


@pytest.mark.parametrize(
    "policy",
    [
        DeliveryPolicy(rate=-1),
        DeliveryPolicy(budgets={"radio": ()}),
        DeliveryPolicy(budgets={"cellular": (Budget(-1, Period.DAY),)}),
        DeliveryPolicy(budgets={"cellular": (Budget(1, Period.DAY),) * 9}),
        DeliveryPolicy(download=(MON,) * 33),
        DeliveryPolicy(activate=(Window((7,), 0, 60),)),
        DeliveryPolicy(activate=(Window((0,), 60, 60),)),
        DeliveryPolicy(activate=(Window((0,), 0, 1441),)),
        DeliveryPolicy(activate=(Window((0,), 0, 60, "x" * 129),)),
    ],
)
def test_impossible_policies_are_refused(policy: DeliveryPolicy) -> None:
    manifest = msgspec.Raw(manifest_bytes(stored(bytes(8))))
    possible = DeliveryPolicy(download=(MON,), budgets={"metered": (Budget(1, Period.DAY),)})
    for wanted, refused in ((possible, False), (policy, True)):
        state = DesiredState(SPOKEN, "f", 1, (DesiredDeployment("d", manifest, delivery=wanted),))
        with pytest.raises(WireError) if refused else contextlib.nullcontext():
            assert decode(encode(state), DesiredState).deployments[0].delivery == wanted


@pytest.mark.parametrize("fields", [{"window": -1}, {"window": 4097}, {"rest_s": -1.0}, {"rest_s": 1e9}])
def test_impossible_needs_are_refused(fields: dict[str, float]) -> None:
    need = Need("a" * 64, "d", (ChunkRange(0, 1),), window=0, rest_s=3600.0, alone=True, anew=True)
    assert decode(encode(need), Need) == need
    with pytest.raises(WireError):
        decode(encode(msgspec.structs.replace(need, **fields)), Need)


@pytest.mark.parametrize("device_id", ["cam-1", "b", "d"])
def test_a_device_may_be_called_as_a_part_of_a_topic(device_id: str) -> None:
    assert is_chunk_topic(broadcast_topic("a" * 64, 5))
    assert is_chunk_topic(repair_topic(device_id, "a" * 64, 5))
    assert parse_chunk_topic(repair_topic(device_id, "a" * 64, 5)).device_id == device_id
    assert not any(is_chunk_topic(device_topic(device_id, leaf)) for leaf in DeviceTopic)


@pytest.mark.parametrize("numbers", ["1-2-x", "1--2", "-1", "-".join(["1"] * 17), "1-2-3-"])
def test_combinations_that_are_none_are_refused(numbers: str) -> None:
    assert parse_chunk_topic(broadcast_topic("a" * 64, 5, 7, 9)).others == (7, 9)
    with pytest.raises(WireError):
        parse_chunk_topic(f"shoal/v1/b/{'a' * 64}/{numbers}")
