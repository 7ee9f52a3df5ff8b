"""`shoal-agent`: picks the version of the agent that runs, and takes a new one back that does not prove itself.

It is the one part that no release of the agent replaces, so it does little: it reads pointers in `<state>/agent`, which
the agent sets (`agent.releases.folder`), and becomes the agent that they name. Where there are none, that is the one
that is installed. It needs nothing but the standard library, and imports next to nothing.

    current   → releases/DIGEST, what has proved itself; where it is absent, or says `installed`, what is installed
    next      → releases/DIGEST or `installed`: on trial. The agent proves itself by renaming it to `current`
    previous  → what `current` was before
    trial.json    how it is tried, and how often it was started; written before each start
    failed.json   trials that ended badly, by deployment, with the reason
    before/       the journal as it was before the first start
    installed     the version that was installed when `next` was set: where another one is by now, that one runs
    waits         what the version on trial still waits for, in a sentence

Without a trial the launcher becomes the agent: the process is the same one. While a trial goes on it stays, as the
agent's parent, with the sockets that clients connect to: so it notices an end, takes a version back that is not there
in time, and nobody is turned away meanwhile. Every step may be the last one before the power fails: whoever starts
next goes on from what lies there.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

LAUNCHER = 1  # the number of this launcher: releases name the oldest that can start them
INSTALLED = "installed"
OTHERS = frozenset({"facts", "enroll", "bundle", "--help", "-h", "--version"})  # commands that start no daemon
DEFAULT_STATE = "/var/lib/shoal-agent"
# In the environment, for the agent: how the launcher is started, and where the running release lies.
COMMAND, RELEASE = "SHOAL_LAUNCHER_COMMAND", "SHOAL_LAUNCHER_RELEASE"
SEPARATOR = "\x1f"  # between what the first of them says: launcher, installed version, PYTHONPATH, command line
# For a launcher that an agent becomes: the process that watches it already.
WATCHER = "SHOAL_LAUNCHER_WATCHER"
# Sockets that one agent hands to the next: `agent.releases.handover`.
SOCKETS = "SHOAL_LAUNCHER_SOCKETS"


def main() -> None:
    """Become the agent."""
    arguments = sys.argv[1:]
    from agent import __version__

    path = os.environ.get("PYTHONPATH", "")
    os.environ[COMMAND] = SEPARATOR.join((str(LAUNCHER), __version__, path, sys.executable, *sys.orig_argv[1:]))
    folder = release_folder(arguments, os.environ)
    if folder is None or not os.path.isdir(folder) or _replaced(folder, __version__):
        become(INSTALLED, folder or "", arguments)
    elif OTHERS.intersection(arguments):
        become(usable(folder), folder, arguments)
    elif pointer(folder, "next") is None:
        become_usable(folder, arguments)
    else:
        from agent.release_trial import Trials

        Trials(folder, arguments).run()


def release_folder(arguments: list[str], environment: Mapping[str, str]) -> str | None:
    """Where the releases of a device lie; None where it has none, because its owner said so or nothing can be read."""
    values: dict[str, Any] = {}
    path = next((one.partition("=")[2] for one in arguments if one.startswith("--config=")), "")
    if "--config" in arguments[:-1]:
        path = arguments[arguments.index("--config") + 1]
    if path:
        try:
            with open(path, "rb") as file:
                values = _top(file.read().decode())
        except (OSError, ValueError):
            return None  # the agent says what is wrong with it
    state = environment.get("SHOAL_AGENT_STATE_DIR") or values.get("state_dir") or DEFAULT_STATE
    allowed = environment.get("SHOAL_AGENT_SELF_UPDATE") or values.get("self_update") or "on"
    return os.path.join(str(state), "agent") if allowed == "on" else None


def _top(text: str) -> dict[str, Any]:
    """What a configuration says outside of tables, of the keys that count here.

    Nearly all say it plainly; to import the whole reader takes as long as the interpreter, and the worker waits for it.

    Raises:
        ValueError: when it is no TOML.
    """
    values: dict[str, Any] = {}
    for line in f"\n{text}".partition("\n[")[0].splitlines():
        key, _, value = (part.strip() for part in line.partition("="))
        if key in {"state_dir", "self_update"}:
            plain = len(value) >= 2 and value[0] == value[-1] == '"' and not {'"', "\\"} & set(value[1:-1])
            if not plain or '"""' in text or "'''" in text:
                import tomllib

                return tomllib.loads(text)
            values[key] = value[1:-1]
    return values


def _replaced(folder: str, installed: str) -> bool:
    """Whether another version was installed since a release was first tried: whoever did that meant it."""
    try:
        with open(os.path.join(folder, INSTALLED)) as file:
            return file.read().strip() != installed
    except OSError:
        return False


def pointer(folder: str, name: str) -> str | None:
    """What a pointer names: `releases/DIGEST` or `installed`; None where there is none."""
    try:
        return os.readlink(os.path.join(folder, name))
    except OSError:
        return None


def runs(folder: str, which: str) -> bool:
    """Whether a release is there to be started."""
    if which == INSTALLED:
        return True
    entry = os.path.join(folder, which, "release.json")
    return os.path.isfile(entry) and os.path.isdir(os.path.join(folder, which, "site"))


def usable(folder: str) -> str:
    """What has proved itself and is there."""
    for name in ("current", "previous"):
        which = pointer(folder, name)
        if which is not None and runs(folder, which):
            return which
    return INSTALLED


def become_usable(folder: str, arguments: list[str]) -> None:
    """Become what has proved itself; where that can't be started, what is installed."""
    which = usable(folder)
    try:
        become(which, folder, arguments)
    except (OSError, ValueError, KeyError) as error:
        say(f"{which} can't be started ({error}); what is installed runs")
        become(INSTALLED, folder, arguments)


def become(which: str, folder: str, arguments: list[str]) -> None:
    """Run a version in this process, in its place where it is another one than this.

    Raises:
        OSError: when it can't be started.
    """
    if which == INSTALLED:
        os.environ.pop(RELEASE, None)
        from agent.main import main as run_agent

        run_agent()
        return
    place = os.path.join(folder, which)
    import json

    with open(os.path.join(place, "release.json")) as file:
        told = json.load(file)
    interpreter = os.path.join(place, told["interpreter"]) if told.get("interpreter") else sys.executable
    path = os.path.join(place, "site")
    if os.environ.get("PYTHONPATH"):
        path += os.pathsep + os.environ["PYTHONPATH"]
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", RELEASE: place}
    os.execve(interpreter, [interpreter, "-m", told.get("entry") or "agent.main", *arguments], environment)


def say(text: str) -> None:
    """For people, where the agent's log goes."""
    print(f"launcher: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
