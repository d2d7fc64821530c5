"""Table that compares the loss of each step with the control's, and the worker time that it took."""

from collections.abc import Sequence

from meteor.formatting import format_duration
from meteor.report.data import RunResult, StudyTable
from meteor.report.measures import step_seconds
from meteor.report.seeds import by_variant
from meteor.report.tables import NOT_RECORDED, NOT_RUN, Table
from meteor.runs.reading import StageRecord
from meteor.stages import TRAINING_STAGES


def losses_table(spec: StudyTable, runs: Sequence[RunResult]) -> Table:
    """Lay out the losses of each variant's first seed beside the control's, with the time of steps and encoding.

    Worker time is the steps' seconds times the number of workers. A variant that reads the cache pays for all encoding into
    it, its evaluation's images included; a variant that encodes in its steps pays within them.
    """
    groups = by_variant(runs)
    losses = [column for stage in TRAINING_STAGES for column in (f"Last loss, {stage}", f"Largest difference, {stage}")]
    columns = ("Variant", *losses, "Worker time of steps", "Encoding into the cache", "In all")
    control = groups[spec.control][0] if spec.control in groups else None
    rows = []
    for variant in spec.variants:
        if variant not in groups:
            continue
        run = groups[variant][0]
        cells = [cell for stage in TRAINING_STAGES for cell in _loss_cells(run, control, stage)]
        rows.append((variant, *cells, *_time_cells(run)))
    return Table(columns, tuple(rows))


def _loss_cells(run: RunResult, control: RunResult | None, stage: str) -> tuple[str, str]:
    mine = run.stages.get(stage)
    theirs = control.stages.get(stage) if control is not None else None
    if mine is None or not mine.metrics:
        return NOT_RUN, ""
    last = f"{mine.metrics[-1]['loss']:#.4g}"
    if run is control:
        return last, "control"
    found = None if theirs is None else largest_difference(mine, theirs)
    return last, NOT_RECORDED if found is None else f"{found:.2g}"


def largest_difference(stage: StageRecord, control: StageRecord) -> float | None:
    """Return the largest difference of the losses of equal steps; None if the steps are not the same."""
    mine, theirs = ({row["step"]: row["loss"] for row in each.metrics} for each in (stage, control))
    if not mine or mine.keys() != theirs.keys():
        return None
    return float(max(abs(mine[step] - theirs[step]) for step in mine))


def _time_cells(run: RunResult) -> tuple[str, str, str]:
    steps_s, reads_cache = 0.0, False
    for name in TRAINING_STAGES:
        stage = run.stages.get(name)
        seconds = step_seconds(stage) if stage is not None and stage.finished else None
        if stage is None or seconds is None:
            return NOT_RECORDED, NOT_RECORDED, NOT_RECORDED
        steps_s += seconds * stage.settings.get("runtime", {}).get("num_workers", 1)
        reads_cache |= stage.settings.get(name, {}).get("features", "cache") == "cache"
    if not reads_cache:
        return format_duration(steps_s), "in the steps", format_duration(steps_s)
    if run.encoding_s is None:
        return format_duration(steps_s), NOT_RECORDED, NOT_RECORDED
    return format_duration(steps_s), format_duration(run.encoding_s), format_duration(steps_s + run.encoding_s)
