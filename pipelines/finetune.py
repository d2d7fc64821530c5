"""Stage 2, finetune: projector and language model learn from instructions; the encoder stays frozen."""

import sys
from functools import partial

from meteor.planning.steps import plan_text
from pipelines.command import stage_main
from pipelines.ray_parts.training import run_stage

_DESCRIPTION = """Train projector and language model on instructions from cached features (paper, section 4.1). A second start
with the same settings resumes from the last checkpoint, or says that the stage has finished."""

run = partial(run_stage, stage="finetune")
plan = partial(plan_text, stage="finetune")

if __name__ == "__main__":
    sys.exit(stage_main("finetune", _DESCRIPTION, run, plan))
