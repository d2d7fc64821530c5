"""Stage 2: projector and language model learn from instructions; the encoder stays frozen."""

import sys

from meteor.config import RunSettings
from meteor.planning.steps import plan_text
from pipelines.ray_parts.training import run_stage
from pipelines.stage import Summary, stage_main

_DESCRIPTION = """Train projector and language model on instructions from cached features (paper, section 4.1). Started again
with the same settings it resumes from its last checkpoint, or says that it is finished."""


def run(settings: RunSettings) -> Summary:
    return run_stage(settings, "finetune")


def plan(settings: RunSettings) -> str:
    return plan_text(settings, "finetune")


if __name__ == "__main__":
    sys.exit(stage_main("finetune", _DESCRIPTION, run, plan))
