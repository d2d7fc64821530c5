"""Plan of a run, or of all runs of a study: finished stages, shared stages, and the cost of the others."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from meteor.assembly import Inputs, make_lora
from meteor.assembly.recipe import check_answer_counts
from meteor.config import RunSettings
from meteor.formatting import shorten
from meteor.planning.cache_cost import CacheCost
from meteor.planning.rates import Rate, RateOptions, Rates
from meteor.planning.study_plan import CacheRow, StageWork, StudyPlan
from meteor.planning.survey import estimate_cache
from meteor.projector import build_projector
from meteor.runs.identity import describe_left_out
from meteor.runs.tasks import Task, make_tasks
from meteor.stages import STAGES, TRAINING_STAGES, TrainingStage
from meteor.train.build import DTYPES, read_llm_config
from meteor.train.lora import Lora, add_lora
from meteor.vision.checkpoint import read_vision_config

# Bytes per trained parameter: master weight and two moments in float32.
_CHECKPOINT_BYTES = 12
# Letters of the names of runs in a note.
_MAX_NAMES = 100


def plan_study(inputs: Inputs, runs: Sequence[RunSettings], options: RateOptions | None = None) -> StudyPlan:
    """Plan all stages of all runs. Shared stages count once, finished stages cost nothing.

    Args:
        inputs: settings of the run that describes the study, or of the only run.
        runs: settings of the runs.
        options: the user's knowledge of rates.

    Raises:
        SettingsError: a run names no samples, a model that does not exist, or a number of visual tokens that its projector
            cannot make.
    """
    for run in runs:
        check_answer_counts(run)
    settings, tasks = inputs.settings, make_tasks([inputs.of(run) for run in runs])
    finished = {key for key, task in tasks.items() if task.folder.finished() is not None}
    costs = {key: estimate_cache(inputs.of(task.settings)) for key, task in tasks.items()}
    caches = {key: cost for key, cost in costs.items() if tasks[key].stage == "cache_features"}
    rates = Rates(settings, options or RateOptions())
    encoding = rates.encoding(list(caches.values()))
    shown = sum(_sub_images(costs[key], task.stage) for key, task in tasks.items() if task.stage in TRAINING_STAGES)
    return StudyPlan(
        name=settings.name,
        work=tuple(_work(stage, tasks, finished, costs, encoding, rates, inputs) for stage in _stages(tasks)),
        caches=tuple(_cache_row(tasks[key], cost) for key, cost in caches.items()),
        checkpoint_bytes=sum(_stage_bytes(task) for task in tasks.values() if task.stage in TRAINING_STAGES),
        avoided_sub_images=shown - sum(cost.num_sub_images for cost in _encoded_once(caches.values())),
        encoder_rate=encoding,
        num_workers=settings.runtime.num_workers,
        worker="GPU" if settings.runtime.gpus_per_worker else "worker",
        states=_states(runs, tasks, finished),
        parallel=settings.study.parallel if settings.study else 1,
        notes=tuple(dict.fromkeys([*_left_out(runs), *(cost.note for cost in costs.values() if cost.note)])),
    )


def _left_out(runs: Sequence[RunSettings]) -> list[str]:
    """Say which stages do not run, and why; runs with the same reason share a note."""
    names: dict[str, list[str]] = {}
    for run in runs:
        for line in describe_left_out(run):
            names.setdefault(line, []).append(run.name)
    return [
        note if len(of) == len(runs) else f"{note} ({shorten(', '.join(of), _MAX_NAMES)})" for note, of in names.items()
    ]


def _stages(tasks: Mapping[str, Task]) -> list[str]:
    return [stage for stage in STAGES if any(task.stage == stage for task in tasks.values())]


def _work(
    stage: str,
    tasks: Mapping[str, Task],
    finished: set[str],
    costs: Mapping[str, CacheCost],
    encoding: Rate | None,
    rates: Rates,
    inputs: Inputs,
) -> StageWork:
    mine = {key: task for key, task in tasks.items() if task.stage == stage}
    left = {key: task for key, task in mine.items() if key not in finished}
    if stage == "cache_features":
        once = _encoded_once(costs[key] for key in mine)
        amount, unit, rate = sum(cost.num_sub_images * _missing_share(cost) for cost in once), "sub-images", encoding
    elif stage == "evaluate":
        sets = [inputs.of(task.settings).question_sets() for task in left.values()]
        amount = sum(len(questions.questions) for question_sets in sets for questions in question_sets)
        unit, rate = "questions", rates.answering()
    else:
        amount = sum(part.llm_flops for key in left for part in costs[key].stages if _is_part_of(part.name, stage))
        unit, rate = "FLOP", rates.training(stage)  # type: ignore[arg-type]
    num_shared = sum(len(task.used_by) > 1 for task in mine.values())
    return StageWork(stage, len(mine), num_shared, len(mine) - len(left), amount, unit, rate)


def _encoded_once(costs: Any) -> list[CacheCost]:
    """Return one cost per cache key: a cache in another codec is converted, so that images are encoded once."""
    return list({cost.cache_uri.rpartition("/")[0]: cost for cost in costs}.values())


def _missing_share(cost: CacheCost) -> float:
    return 1 - cost.num_cached / cost.num_distinct if cost.num_distinct else 0.0


def _sub_images(cost: CacheCost, stage: str) -> float:
    """Count the sub-images that a training stage shows, over all its epochs."""
    return sum(part.num_sub_images * part.epochs for part in cost.stages if _is_part_of(part.name, stage))


def _is_part_of(name: str, stage: str) -> bool:
    """Return whether a name is that of the stage or of one of the stage's files."""
    return name == stage or name.startswith(f"{stage}, ")


def _cache_row(task: Task, cost: CacheCost) -> CacheRow:
    codec = task.settings.cache.codec
    return CacheRow(
        codec, cost.num_distinct, cost.num_distinct - cost.num_cached, len(task.used_by), cost.size_bytes[codec]
    )


def _stage_bytes(task: Task) -> int:
    """Estimate the bytes of a training stage's kept checkpoints and of its result."""
    settings, stage = task.settings, task.stage
    assert stage in TRAINING_STAGES
    trained, frozen = _count_parameters(settings, stage)
    kept = settings.training(stage).keep_checkpoints + bool(settings.data.held_out.get(stage))
    result = 4 * trained
    if stage == "finetune":
        result = DTYPES[settings.llm.dtype].itemsize * (trained + frozen)
    return kept * _CHECKPOINT_BYTES * trained + result


def _count_parameters(settings: RunSettings, stage: TrainingStage) -> tuple[int, int]:
    """Count a stage's trained and frozen parameters: projector in both stages, language model in stage 2."""
    llm, vision = read_llm_config(settings.llm.path), read_vision_config(settings.vision.path)
    widths = {"vision_width": vision.hidden_size, "llm_width": llm.hidden_size}
    with torch.device("meta"):
        projector = build_projector(settings.projector.name, **widths, **settings.projector.settings)
    num_projector = sum(parameter.numel() for parameter in projector.parameters())
    trained, frozen = _count_llm(settings.llm.path, stage, make_lora(settings.training(stage)))
    return num_projector + trained, frozen


@functools.lru_cache(maxsize=32)
def _count_llm(path: str, stage: TrainingStage, lora: Lora | None) -> tuple[int, int]:
    """Count trained and frozen parameters of a stage's language model, on the meta device."""
    with torch.device("meta"):
        language_model: Any = AutoModelForCausalLM.from_config(read_llm_config(path))
    language_model.requires_grad_(stage == "finetune")
    if lora is not None:
        add_lora(language_model, lora)
    counts = {True: 0, False: 0}
    for parameter in language_model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    return counts[True], counts[False]


def _states(runs: Sequence[RunSettings], tasks: Mapping[str, Task], finished: set[str]) -> dict[str, dict[str, str]]:
    """Return run -> stage -> "finished", "to do", or "with <the run that does it>"."""
    states: dict[str, dict[str, str]] = {run.name: {} for run in runs}
    for key, task in tasks.items():
        for position, name in enumerate(task.used_by):
            state = "finished" if key in finished else "to do" if position == 0 else f"with {task.used_by[0]}"
            states[name][task.stage] = state
    return states
