"""Settings of a training stage as plain arguments for `meteor.train`."""

from meteor.config import FinetuneSettings, StageSettings
from meteor.train.lora import Lora
from meteor.train.plan import Batching, Recipe


def make_recipe(stage: StageSettings, native_weight_full: float | None, batching: Batching) -> Recipe:
    """Return the recipe of a stage.

    Args:
        stage: settings of the stage.
        native_weight_full: weight of the native expert after its warm-up; None for projectors without this expert.
        batching: layout of a batch, which `meteor.assembly.language_model.find_way` chooses.
    """
    return Recipe(
        lr=stage.lr,
        global_batch_size=stage.global_batch_size,
        micro_batch_size=stage.micro_batch_size,
        epochs=stage.epochs,
        warmup_ratio=stage.warmup_ratio,
        seed=stage.seed,
        native_warmup=stage.native_warmup,
        native_weight_full=native_weight_full,
        aux_loss_coefficient=stage.aux_loss_coefficient,
        batching=batching,
        max_length=stage.max_length,
        checkpoint_every_steps=stage.checkpoint_every_steps,
        checkpoint_every_s=stage.checkpoint_every_minutes * 60,
        keep_checkpoints=stage.keep_checkpoints,
        has_dropout=(lora := make_lora(stage)) is not None and lora.dropout > 0,
    )


def make_lora(stage: StageSettings) -> Lora | None:
    """Return the adapters' settings; None if the language model trains in full, or not at all."""
    if not isinstance(stage, FinetuneSettings) or stage.lora is None:
        return None
    return Lora(stage.lora.rank, stage.lora.alpha, stage.lora.dropout, stage.seed)
