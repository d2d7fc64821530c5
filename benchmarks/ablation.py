"""Time of six variants over one cache against variants with a cache each: `python benchmarks/ablation.py`.

The demo's study runs with one seed, on part of its samples, with six of its variants, one at a time. Whole commands are timed:
`pipelines.ablate` for all variants, then for each variant alone with an output folder, and thus a cache, of its own. The
benchmark needs the demo's data and models (`make demo`).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from side_by_side import print_table

from meteor.config import load_run

RUN = "jobs/runs/demo_ablations.yaml"
SETTINGS = [
    *("study.seeds=[]", "study.parallel=1", "study.measure_questions=0", "report.num_figures=0"),
    *("pretrain.epochs=1", "finetune.epochs=1", "pretrain.fraction=0.4", "finetune.fraction=0.2", "evaluate.limit=20"),
]


def main() -> None:
    options = read_options()
    study = load_run(RUN).study
    assert study is not None, f"{RUN} holds a study"
    names = list(study.variants)[:6]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        together = ablate(f"{folder}/together", names)
        alone = {name: ablate(f"{folder}/{name}", [name]) for name in names}
    whole = sum(seconds for seconds, _ in alone.values())
    print_table(
        ["", "wall time", "ratio", "images encoded"],
        [
            ["six variants over one cache", f"{together[0]:.0f} s", "1", f"{together[1]:,}"],
            [
                "six variants with a cache each",
                f"{whole:.0f} s",
                f"{whole / together[0]:.2f}",
                f"{sum(images for _, images in alone.values()):,}",
            ],
        ],
    )


def ablate(output: str, names: list[str]) -> tuple[float, int]:
    """Run variants of the study; return the command's duration in seconds and the number of images it encoded."""
    options = [word for name in names for word in ("--only", name)]
    # The study's tables are dropped, because a table that names a missing variant is refused.
    command = [
        sys.executable,
        "-m",
        "pipelines.ablate",
        "--run",
        RUN,
        *options,
        f"output={output}",
        "study.tables={}",
        *SETTINGS,
    ]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    summaries = Path(output, "runs").glob("cache_features-*/summary.json")
    return seconds, sum(json.loads(file.read_text())["counts"]["images_encoded"] for file in summaries)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="folder for temporary runs (default: the system's temporary folder)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
