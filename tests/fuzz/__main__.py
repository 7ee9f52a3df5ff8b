"""The long form: `python -m tests.fuzz --runs 1000000`, led by coverage (libFuzzer through atheris).

Each decoder runs in a process of its own, which ends at the first exception that is not the decoder's own error, at an
input that takes over ten seconds, and at more memory than a device could spare. The input that did it is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MEMORY_MB = 512
SECONDS_AN_INPUT = 10


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--runs", type=int, default=1_000_000, help="executions in all, shared among the decoders")
    parser.add_argument("--target", action="append", help="only this decoder")
    parser.add_argument("--seed", type=int, default=1, help="of the mutations")
    parser.add_argument("--keep", type=Path, default=ROOT / ".fuzz", help="where corpora and failing inputs are kept")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return _one(options)
    sys.path.insert(0, str(ROOT))
    from tests.fuzz.targets import TARGETS

    names = options.target or sorted(TARGETS)
    shares = sum(TARGETS[name].share for name in names)
    runs = {name: math.ceil(options.runs * TARGETS[name].share / shares) for name in names}
    failed, started = [], time.monotonic()
    for number, name in enumerate(names, 1):
        begun = time.monotonic()
        arguments = ["--one", name, "--runs", str(runs[name]), "--seed", str(options.seed), "--keep", str(options.keep)]
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "tests.fuzz", *arguments],
            cwd=ROOT,
            check=False,
            capture_output=True,
            text=True,
        )
        seconds = time.monotonic() - begun
        said = "ok" if done.returncode == 0 else f"FAILED ({done.returncode})"
        print(
            f"[{number}/{len(names)}] {name:<20} {runs[name]:>9} runs {seconds:7.1f} s  {said}",
            file=sys.stderr,
            flush=True,
        )
        if done.returncode != 0:
            failed.append(name)
            print("\n".join(done.stderr.splitlines()[-40:]), file=sys.stderr, flush=True)
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({"fuzz": names, "runs": sum(runs.values()), "failed": failed, "seconds": seconds}))
    return 1 if failed else 0


def _one(options: argparse.Namespace) -> int:
    import atheris

    with atheris.instrument_imports(include=["agent", "fleet_server"]):
        from tests.fuzz.mutate import mutated
        from tests.fuzz.targets import TARGETS
    target = TARGETS[options.one]
    corpus = options.keep / options.one
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    chance = random.Random(options.seed)

    def change(data: bytes, limit: int, seed: int) -> bytes:
        """Half of the time as a value, else as bytes."""
        chance.seed(seed)
        if chance.random() < 0.5:
            return mutated(bytes(data), chance)[:limit]
        changed: bytes = atheris.Mutate(data, limit)
        return changed

    flags = [
        f"-runs={options.runs}", f"-seed={options.seed}", f"-rss_limit_mb={MEMORY_MB}", f"-timeout={SECONDS_AN_INPUT}",
        f"-artifact_prefix={corpus.parent}/failed-{options.one}-", "-max_len=4096", "-print_final_stats=1", str(corpus),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *flags], target.run, custom_mutator=change)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
