"""Text about a training stage before it starts, for ``--dry-run``."""

from meteor.assembly import Inputs
from meteor.assembly.language_model import check_max_length, find_way
from meteor.assembly.recipe import make_recipe
from meteor.assembly.sample_tables import plan_held_out, plan_samples
from meteor.assembly.training_stage import PreparedStage, check_stage, check_token_ids, prepare
from meteor.config import StageSettings
from meteor.data.order import epoch_length
from meteor.data.table import SampleTable
from meteor.errors import SettingsError
from meteor.formatting import format_share
from meteor.planning.stage_memory import Needs, StageMemory
from meteor.stages import TrainingStage
from meteor.train.plan import Batching, StepPlan, first_steps


def plan_text(inputs: Inputs, *, stage: TrainingStage) -> str:
    """Describe a training stage: its samples, steps, workers and memory.

    Raises:
        SettingsError: the stage will not fit its GPUs; the message contains the text.
        CheckpointError: ``finetune.pretrained`` was trained with other settings.
    """
    settings, prepared = inputs.settings, prepare(inputs, stage)
    check_stage(inputs, stage)
    check_max_length(settings, stage)
    plan, held_out = plan_samples(inputs, prepared), plan_held_out(inputs, prepared)
    options, table, way = settings.training(stage), plan.table, find_way(settings, stage)
    check_token_ids(inputs, plan, held_out)
    totals, state = table.totals(), "finished" if prepared.folder.finished() else "to run or resume"
    rows = {
        "run": f"{prepared.folder.uri} ({state})",
        "samples": f"{totals['samples']:,} used, {len(plan.excluded)} excluded {plan.reasons() or ''}",
        "each epoch": _epoch(prepared, table),
        "held out": f"{len(held_out.table):,}, {len(held_out.excluded)} excluded" if held_out else "",
        "cut to max_length": f"{plan.num_cut:,}",
        "sub-images": f"{totals['sub_images']:,} of {totals['distinct_images']:,} distinct images",
        "tokens": f"{totals['visual_tokens']:,} visual, {totals['text_tokens']:,} text",
        "steps": f"{num_steps(options, table):,} of {options.global_batch_size} samples, {options.epochs} epochs",
        "each step": _step(prepared, table, options, way.batching, settings.runtime.num_workers),
        "language model": way.text,
        "workers": f"{settings.runtime.num_workers}, ZeRO stage {options.zero_stage}, features: {options.features}",
        "pinned": f"index version {prepared.versions.index_version}, cache version {prepared.versions.cache_version}",
    }
    lines = [f"{stage}: plan", *(f"  {name:<18} {text}" for name, text in rows.items() if text)]
    memory = StageMemory.of(settings, stage, Needs.of(table))
    text = "\n".join([*lines, *memory.to_lines()])
    if memory.fits:
        return text
    raise SettingsError(f"{memory.problem()}\n\n{text}")


def num_steps(options: StageSettings, table: SampleTable) -> int:
    """Return the number of steps of a stage, over all its epochs."""
    return first_steps(table.parts, global_batch_size=options.global_batch_size, epochs=options.epochs)[-1]


def _epoch(prepared: PreparedStage, table: SampleTable) -> str:
    """Describe an epoch as samples and passes over each file; "" if it is one pass over one file."""
    sets = prepared.sets
    if [samples.weight for samples in sets] == [1]:
        return ""
    weights = ", ".join(f"{samples.weight:g} x {samples.uri.rpartition('/')[2]}" for samples in sets)
    return f"{epoch_length(table.parts, 0):,}: {weights}"


def _step(
    prepared: PreparedStage, table: SampleTable, options: StageSettings, batching: Batching, num_workers: int
) -> str:
    plan = StepPlan(table, make_recipe(options, None, batching), prepared.versions.index_digest)
    layout = plan.sample_layout(num_workers)
    return (
        f"{layout.rows:,.4g} rows ({batching}), {format_share(layout.padding_share)} padding, "
        f"{layout.micro_steps:,.3g} micro steps per worker"
    )
