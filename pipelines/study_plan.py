"""What a study will do, before it starts: what is cached, trained once and for whom, finished, and what the rest takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from meteor.assembly import open_index, pixel_settings
from meteor.cli.cache_plan import PlanInputs, plan_cache
from meteor.config import RunSettings, Variant
from meteor.data.table_plan import IndexedImages, plan_table
from meteor.data.token_table import tokenise_set
from meteor.errors import CacheError, SettingsError
from meteor.formatting import format_count, format_duration
from meteor.image.budget import visual_token_budget
from meteor.stages import TrainingStage
from meteor.text.tokens import load_tokenizer
from pipelines import evaluate
from pipelines.inputs import load_mixture
from pipelines.preparation import prepare, stage_settings
from pipelines.stage import Summary
from pipelines.studies.tasks import STAGES, Task, distinct_caches

# As many samples of a file tell how many tokens all of them have, to about a percent.
_NUM_SAMPLED = 256


def plan_study(settings: RunSettings, variants: Sequence[Variant], tasks: Mapping[str, Task]) -> str:
    """The plan as text; stages that have not run are planned on the newest index, or without one on nothing."""
    finished = {key: summary for key, task in tasks.items() if (summary := find_finished(task)) is not None}
    names = list(dict.fromkeys(variant.name for variant in variants))
    seeds = len(variants) // len(names)
    lines = [
        f"ablate: plan of {settings.name}, {len(names)} variants" + (f" with {seeds} seeds each" if seeds > 1 else ""),
        *_caches(variants),
        *(_stage_line(stage, tasks, finished) for stage in STAGES),
        f"  at the same time   {(settings.study and settings.study.parallel) or 'as many as there is room for'}",
        *_cost(tasks, finished),
        "",
        *_rows(variants, tasks, finished),
    ]
    return "\n".join(lines)


def find_finished(task: Task) -> Summary | None:
    """The summary of a task that an earlier start, or another run, has done."""
    try:
        if task.stage == "evaluate":
            return evaluate.find_run(task.settings).finished()
        return prepare(task.settings, task.stage).run.finished()  # type: ignore[arg-type]
    except (CacheError, SettingsError):  # what it needs is not there yet
        return None


def _caches(variants: Sequence[Variant]) -> list[str]:
    lines, inputs = [], PlanInputs()
    for settings, users in distinct_caches(variants).values():
        plan = plan_cache(settings, inputs)
        missing = plan.num_distinct - plan.num_cached
        state = f"{format_count(missing)} to encode" if missing else "nothing to encode"
        lines.append(
            f"  cache              {settings.cache.codec}, {format_count(plan.num_distinct)} images, {state}; read by "
            f"{len(users)} runs"
        )
    return lines


def _stage_line(stage: str, tasks: Mapping[str, Task], finished: Mapping[str, Summary]) -> str:
    mine = {key: task for key, task in tasks.items() if task.stage == stage}
    shared = sum(len(task.used_by) > 1 for task in mine.values())
    note = f", {shared} of them shared by several variants" if shared else ""
    return f"  {stage:<18} {len(mine)} to do once{note}; {len(mine.keys() & finished.keys())} finished"


def _rows(variants: Sequence[Variant], tasks: Mapping[str, Task], finished: Mapping[str, Summary]) -> list[str]:
    """One line a run: what each of its stages waits for."""
    of_run: dict[str, dict[str, str]] = {variant.settings.name: {} for variant in variants}
    for key, task in tasks.items():
        for position, name in enumerate(task.used_by):
            state = "finished" if key in finished else "to do" if position == 0 else f"with {task.used_by[0]}"
            of_run[name][task.stage] = state
    table = [
        ("run", *STAGES),
        *((name, *(cells.get(stage, "-") for stage in STAGES)) for name, cells in of_run.items()),
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    ]


@dataclass(frozen=True)
class Work:
    """Tokens that a stage trains on, over its epochs; estimated."""

    num_visual_tokens: float
    num_text_tokens: float

    @property
    def num_tokens(self) -> float:
        return self.num_visual_tokens + self.num_text_tokens


def estimate_work(settings: RunSettings, stage: TrainingStage) -> Work:
    """From a few hundred samples of each file.

    Raises:
        CacheError: there is no index yet, which knows how many slices an image has.
    """
    options, index = stage_settings(settings, stage), open_index(settings)
    tokenizer = load_tokenizer(settings.llm.path)
    visual = text = 0.0
    for one in load_mixture(settings, stage):
        some = one.select(range(0, len(one), max(len(one) // _NUM_SAMPLED, 1)))
        totals = plan_table(
            some,
            tokenise_set(some, tokenizer, options.template),
            IndexedImages.from_rows(index.rows_named(some.distinct_images), {}),
            budget=visual_token_budget(settings.projector.name, settings.projector.settings),
            pixels=pixel_settings(settings),
            max_length=options.max_length,
            sub_images=options.sub_images,
        ).table.totals()
        share = len(one) / max(totals["samples"], 1) * one.weight * options.fraction * options.epochs
        visual += share * totals["visual_tokens"]
        text += share * totals["text_tokens"]
    return Work(visual, text)


def _cost(tasks: Mapping[str, Task], finished: Mapping[str, Summary]) -> list[str]:
    """Tokens that are left to train on; and the time, at the rate of the stages that have finished."""
    try:
        lines = [_cost_of(stage, tasks, finished, estimate_work) for stage in ("pretrain", "finetune")]
    except CacheError:
        return ["  cost               known when the images are indexed"]
    return [line for line in lines if line]


def _cost_of(
    stage: TrainingStage,
    tasks: Mapping[str, Task],
    finished: Mapping[str, Summary],
    estimate: Callable[[RunSettings, TrainingStage], Work],
) -> str:
    mine = {key: task for key, task in tasks.items() if task.stage == stage}
    left = [estimate(task.settings, stage) for key, task in mine.items() if key not in finished]
    if not left:
        return ""
    visual, total = sum(work.num_visual_tokens for work in left), sum(work.num_tokens for work in left)
    text = f"  cost of {stage:<10} {format_count(round(total))} tokens, {visual / total:.0%} of them visual"
    done = [(estimate(mine[key].settings, stage), finished[key]) for key in mine if key in finished]
    if not done:
        return f"{text}; the time is known when one has finished"
    tokens_per_s = sum(work.num_tokens for work, _ in done) / sum(one.extra["training_seconds"] for _, one in done)
    return f"{text}; about {format_duration(total / tokens_per_s)} of training at the rate of those finished"
