"""Stage 1: the projector learns from captions; everything else is frozen."""

import sys
from functools import partial

from meteor.planning.steps import plan_text
from pipelines.command import stage_main
from pipelines.ray_parts.training import run_stage

_DESCRIPTION = """Train the projector on captions from cached features (paper, section 4.1). Started again with the same
settings it resumes from its last checkpoint, or says that it is finished."""

run = partial(run_stage, stage="pretrain")
plan = partial(plan_text, stage="pretrain")

if __name__ == "__main__":
    sys.exit(stage_main("pretrain", _DESCRIPTION, run, plan))
