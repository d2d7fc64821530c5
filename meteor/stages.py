"""Names of the stages, in the order in which a run executes them."""

from typing import Literal, get_args

Stage = Literal["cache_features", "pretrain", "finetune", "evaluate"]
TrainingStage = Literal["pretrain", "finetune"]

STAGES: tuple[Stage, ...] = get_args(Stage)
TRAINING_STAGES: tuple[TrainingStage, ...] = get_args(TrainingStage)
