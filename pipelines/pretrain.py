"""Stage 1, pretrain: the projector learns from captions; everything else is frozen."""

import sys
from functools import partial

from meteor.planning.steps import plan_text
from pipelines.command import stage_main
from pipelines.ray_parts.training import run_stage

_DESCRIPTION = """Train the projector on captions from cached features (paper, section 4.1). A second start with the same
settings resumes from the last checkpoint, or says that the stage has finished."""

run = partial(run_stage, stage="pretrain")
plan = partial(plan_text, stage="pretrain")

if __name__ == "__main__":
    sys.exit(stage_main("pretrain", _DESCRIPTION, run, plan))
