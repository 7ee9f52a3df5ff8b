"""The faults that a device in one process is put through: each a row of cases, which say what was wrong, or None."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from agent.protocol.errors import WireErrorCode
from agent.update.trust import PieceFetcher, TrustClient, TrustError
from agent.update.updater import INTERRUPTIONS
from tests.faults import device, harness
from tests.faults.disk import Disk, Plan
from tests.tuf_repository import TufRepository

Case = Callable[[], str | None]
STORAGE = frozenset({WireErrorCode.DISK_FULL, WireErrorCode.STORE_ERROR})
YEARS = 5 * 365 * 86_400.0


def points() -> list[str]:
    """What a device does with its disk while it goes through the script."""
    return harness.points_of(lambda state, log, before: device.run(state, log, boot=1, before=before))


def killed(seed: int) -> Iterator[tuple[str, Case]]:
    """SIGKILL before and after every dealing with the disk."""
    for (number, name), side in itertools.product(enumerate(points()), ("before", "after")):
        yield f"{side} {name} (#{number})", partial(harness.survives, [Plan(number, side)])


def power_cut(seed: int) -> Iterator[tuple[str, Case]]:
    """The power fails before and after every dealing with the disk; what is left is decided by chance, four times."""
    for turn, (number, name), side in itertools.product(range(4), enumerate(points()), ("before", "after")):
        plan = Plan(number, side, "power", seed * 1_000_000 + turn * 10_000 + number)
        yield f"{side} {name} (#{number}, seed {plan.seed})", partial(harness.survives, [plan])


def ended_twice(seed: int) -> Iterator[tuple[str, Case]]:
    """A second end while the device still recovers from the first, and a third."""
    chance, count = random.Random(seed), len(points())
    for number in range(200):
        plans = [
            Plan(chance.randrange(limit), chance.choice(["before", "after"]), chance.choice(["kill", "power"]), number)
            for limit in (count, 30, 30)
        ]
        yield " then ".join(f"{plan.how} {plan.side} #{plan.point}" for plan in plans), partial(_ended_often, plans)


def _ended_often(plans: list[Plan]) -> str | None:
    """As any, but that a version is given up when so many ends come while it is tried: it may be to blame."""
    lost = harness.survives(plans)
    blamed = f"detail='the agent ended {INTERRUPTIONS} times while it loaded or watched the version')"
    given_up = lost is not None and all(one.endswith(blamed) for one in lost.split("; "))
    return None if given_up and len(plans) >= INTERRUPTIONS else lost


def damaged(seed: int) -> Iterator[tuple[str, Case]]:
    """A file of a device that was killed is emptied, cut, overwritten or removed."""
    chance, count = random.Random(seed), len(points())
    hows = ("empty", "half", "noise", "gone")
    for turn, how, what in itertools.product(range(6), hows, ("journal.db", "spool.db", "serving.json", "artifacts")):
        plan = Plan(chance.randrange(count // 3, count))
        yield f"{how} {what} after #{plan.point} ({turn})", partial(_damaged, plan, how, what, chance.random())


def _damaged(plan: Plan, how: str, what: str, seed: float) -> str | None:
    chance = random.Random(seed)
    with harness.Home() as home:
        home.run(plan)
        hurt = [path for path in (home.state / what).iterdir() if path.is_file()] if what == "artifacts" else []
        hurt = [chance.choice(hurt)] if hurt else [home.state / what]
        for path in [one for one in hurt if one.is_file()]:
            content = path.read_bytes()
            if how == "gone":
                path.unlink()
            elif how == "noise":
                middle = len(content) // 2
                path.write_bytes(content[:middle] + chance.randbytes(200) + content[middle + 200 :])
            else:
                path.write_bytes(content[: len(content) // 2] if how == "half" else b"")
        # Of `n` there is one version alone: without its bytes nothing can stand in. `m` has a second one by then.
        excused = (frozenset({"n"}) | _without_second(home)) if what == "artifacts" else frozenset()
        # One that came damaged was fetched again already: when its file is damaged too, it fails.
        home.run(excused=excused, storage_fails=frozenset({WireErrorCode.DIGEST_MISMATCH}))
        return home.verdict()


def _without_second(home: harness.Home) -> frozenset[str]:
    """`m`, where its first version was its only one."""
    versions = {one["active"]["m"] for one in home.seen() if "m" in one.get("active", {})}
    return frozenset({"m"} if len(versions) < 2 else ())


def bad_network(seed: int) -> Iterator[tuple[str, Case]]:
    """Chunks are lost, doubled and reordered, and the agent is killed now and then."""
    chance, count = random.Random(seed), len(points())
    for number in range(60):
        plans = [Plan(chance.randrange(count))] if number % 2 else []
        yield f"seed {number}, {len(plans)} kills", partial(harness.survives, plans, network=number)


def clock_set(seed: int) -> Iterator[tuple[str, Case]]:
    """The clock is set by years, forward and back, while the device works."""
    for number in range(20):
        yield f"seed {number}", partial(_clock_set, random.Random(f"{seed}.{number}"))


def _clock_set(chance: random.Random) -> str | None:
    real, offset = time.time, 0.0

    def each(_log: device.Log) -> None:
        nonlocal offset
        if chance.random() < 0.1:
            offset = chance.uniform(-YEARS, YEARS)
        time.time = lambda: real() + offset

    with harness.Home() as home:
        home.run(each=each)
        verdict = home.verdict()
        said = {code for one in home.seen() for code in one.get("problems", ())}
        return verdict or (None if "clock_set" in said else "nobody was told that the clock was set")


def disk_full(seed: int) -> Iterator[tuple[str, Case]]:
    """The device's folder is a small disk: full from the start, or filled by somebody while the device works."""
    for size_kb in range(40, 400, 12):
        yield f"a disk of {size_kb} KiB that grows later", partial(_small_disk, size_kb)
    for step in range(len(device.SCRIPT)):
        yield f"filled in step {step}, freed later", partial(_filled, step)


def _small_disk(size_kb: int) -> str | None:
    with harness.Home() as home:
        _mount(home.state, f"size={size_kb}k")
        try:
            until = time.monotonic() + 0.6

            def each(_log: device.Log) -> None:
                if time.monotonic() > until:
                    os._exit(0)  # as a machine that is switched off; the disk is exchanged meanwhile

            home.run(each=each, storage_fails=STORAGE)
            _mount(home.state, "remount,size=4m")
            home.run(storage_fails=STORAGE)
            return home.verdict()
        finally:
            subprocess.run(["umount", str(home.state)], check=True)


def _filled(step: int) -> str | None:
    with harness.Home() as home:
        _mount(home.state, "size=1m")
        try:
            balloon = home.state / "balloon"
            since: list[float] = []

            def each(log: device.Log) -> None:
                if log.step == step and not since:
                    since.append(time.monotonic())
                    with balloon.open("wb", buffering=0) as file:
                        try:
                            while file.write(bytes(4096)):
                                pass
                        except OSError:
                            pass
                elif since and balloon.exists() and time.monotonic() - since[0] > 1.0:
                    balloon.unlink()

            home.run(each=each, storage_fails=STORAGE)
            verdict = home.verdict()
            said = {code for one in home.seen() for code in one.get("problems", ())}
            return verdict or (
                None if "disk_full" in said or _failed(home) else "nobody was told that the disk is full"
            )
        finally:
            subprocess.run(["umount", str(home.state)], check=True)


def _failed(home: harness.Home) -> bool:
    return any(one.get("tries") for one in home.seen())


def read_only(seed: int) -> Iterator[tuple[str, Case]]:
    """The device's disk can only be read at a start; later it can be written again."""
    chance, count = random.Random(seed), len(points())
    for number in range(12):
        yield f"seed {number}", partial(_read_only, Plan(chance.randrange(count // 3, count)))


def _read_only(plan: Plan) -> str | None:
    with harness.Home() as home:
        _mount(home.state, "size=4m")
        try:
            home.run(plan)
            _mount(home.state, "remount,ro")
            until = time.monotonic() + 0.8

            def each(_log: device.Log) -> None:
                if time.monotonic() > until:
                    os._exit(0)

            home.run(each=each, storage_fails=STORAGE)
            _mount(home.state, "remount,rw")
            home.run(storage_fails=STORAGE)
            return home.verdict()
        finally:
            subprocess.run(["umount", str(home.state)], check=True)


def _mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


# -- what is trusted


def trust_ended(seed: int) -> Iterator[tuple[str, Case]]:
    """SIGKILL and power cuts while TUF metadata is brought up to date, twice: nothing trusted is taken back."""
    found = harness.points_of(lambda state, log, before: _trusting(state, log, before, Fleet()))
    for (number, name), side, how in itertools.product(
        enumerate(found), ("before", "after"), ("kill", "power", "power")
    ):
        plan = Plan(number, side, how, seed * 1000 + number)
        yield f"{how} {side} {name} (#{number})", partial(_trust_survives, plan)


class Fleet:
    """A TUF repository before and after a change of its root and its targets."""

    def __init__(self) -> None:
        repository = TufRepository()
        repository.add("model.m", "m/1/v.json", b"one")
        self.old = dict(repository.files)
        repository.root.version += 1
        repository.publish_root()
        repository.add("model.m", "m/2/v.json", b"two")
        self.new = dict(repository.files)
        self._repository = repository

    def client(self, state: Path, *, new: bool) -> TrustClient:
        self._repository.files = dict(self.new if new else self.old)
        return TrustClient(state / "trust", None, PieceFetcher(self._repository.ask()), first_use=True)


def _trusting(state: Path, log: Path, before: Callable[[], None], fleet: Fleet) -> None:
    seen = device.Log(log)
    before()
    for new, (path, content) in enumerate([("m/1/v.json", b"one"), ("m/2/v.json", b"two")]):
        client = fleet.client(state, new=bool(new))
        client.refresh()
        client.check(path, content)
        seen.say(trusted=new)


def _trust_survives(plan: Plan) -> str | None:
    fleet = Fleet()
    with harness.Home() as home:
        disk = Disk(home.state, plan)
        harness.forked(lambda: _trusting(home.state, home.log, disk.install, fleet), home.log)

        def again() -> None:
            if any(one.get("trusted") == 1 for one in home.seen()):
                try:
                    fleet.client(home.state, new=False).refresh()
                except TrustError:
                    pass
                else:
                    raise AssertionError("metadata was taken back to what it was before")
            client = fleet.client(home.state, new=True)
            client.refresh()
            client.check("m/2/v.json", b"two")
            device.Log(home.log).say(finished=True)

        harness.forked(again, home.log)
        return home.verdict()


SCENARIOS: dict[str, Callable[[int], Iterator[tuple[str, Case]]]] = {
    "killed": killed,
    "power cut": power_cut,
    "ended three times": ended_twice,
    "damaged files": damaged,
    "bad network": bad_network,
    "clock set": clock_set,
    "trust metadata": trust_ended,
    "disk full": disk_full,
    "read-only disk": read_only,
}
NEED_MOUNT = frozenset({"disk full", "read-only disk"})


def can_mount() -> bool:
    """Whether this process may mount a small disk."""
    return (
        shutil.which("unshare") is not None
        and subprocess.run(
            ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False, capture_output=True
        ).returncode
        == 0
    )
