"""Damage to every file of a finished run, one at a time: `python benchmarks/damage.py OUTPUT` counts how readers react.

A copy of the output folder of a small run (for example of `make demo`) is damaged: single flipped bits, cuts, zeros. Damage is
refused by an error that names the file, or harmless, as for white space in JSON. Silent damage, which changes what is read, and
raw exceptions must not occur.
"""

import argparse
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

from side_by_side import print_table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "pipelines"))
from damage import damage_everything


def main() -> None:
    """Print a row per kind of file; exit with status 1 if damage was silent or raised a raw exception."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="output folder of a finished run with tiny models")
    parser.add_argument("--flips", type=int, default=12, help="flipped bits per file (12)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the places (0)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(shutil.copytree(arguments.output, Path(folder) / "out", ignore=shutil.ignore_patterns("ray_train")))
        kinds = damage_everything(out, flips=arguments.flips, seed=arguments.seed)
    rows = [
        [
            name,
            *map(str, (kind.tried, kind.refused, kind.harmless, len(kind.silent), len(kind.raw), len(kind.unverified))),
        ]
        for name, kind in kinds.items()
    ]
    totals = [sum(int(row[i]) for row in rows) for i in range(1, 7)]
    heads = ["file", "tried", "refused", "harmless", "silent", "raw", "not seen by `meteor verify`"]
    print_table(heads, [*rows, [f"all {len(rows)}", *map(str, totals)]])
    sys.exit(1 if any(totals[3:]) else 0)


if __name__ == "__main__":
    main()
