"""Feature cache on Ceph's object gateway under faults: `python benchmarks/faults.py` prints lost and duplicated rows.

Each run has two writers with common images and a reader. A proxy injects faults of one kind into some of their requests
(tests/s3/proxy.py). In the last two rows the writers are also killed (SIGKILL) and restarted. The benchmark needs the packages
that `make test-s3` installs.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "s3"))
from ceph import ceph_gateway
from proxy import KINDS
from runs import Outcome, run

_RATE = 0.2
_MIXED = "all of them"
_HEAD = ("fault kind", "runs", "faults injected", "rows written", "rows lost", "rows duplicated")


def main() -> None:
    """Print a row per kind of fault; exit with status 1 if anything was lost or duplicated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--runs", type=int, default=2, help="runs per kind of fault (2: about three minutes on two cores)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first run (0)")
    arguments = parser.parse_args()
    seeds = range(arguments.seed, arguments.seed + arguments.runs)
    failed = False
    print("| " + " | ".join(_HEAD) + " |\n|" + "---|" * len(_HEAD), flush=True)
    with ceph_gateway() as endpoint:
        for name in (*KINDS, _MIXED, "kill -9", f"kill -9 and {_MIXED}"):
            kinds = (name,) if name in KINDS else KINDS
            rate = 0.0 if name == "kill -9" else _RATE
            outcomes = [run(endpoint, seed=seed, kinds=kinds, rate=rate, kill="kill" in name) for seed in seeds]
            failed |= _print_row(name, outcomes)
    sys.exit(failed)


def _print_row(name: str, outcomes: list[Outcome]) -> bool:
    lost, duplicated = sum(o.num_lost for o in outcomes), sum(o.num_duplicated for o in outcomes)
    faults, written = sum(o.num_faults for o in outcomes), sum(o.num_written for o in outcomes)
    print(f"| {name} | {len(outcomes)} | {faults} | {written} | {lost} | {duplicated} |", flush=True)
    problems = [problem for outcome in outcomes for problem in outcome.problems]
    for problem in problems:
        print(f"{name}: {problem}", file=sys.stderr)
    return bool(lost or duplicated or problems)


if __name__ == "__main__":
    main()
