"""Results of runs for the report, read from the runs' folders; MLflow knows the folders of a study's variants."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from meteor import storage
from meteor.assembly import Inputs
from meteor.assembly.study import study_uri
from meteor.checksums import read_checked_json, write_checked_json
from meteor.config import RunSettings, expand_study
from meteor.errors import MeteorError, NotFoundError, SettingsError, TrackingError
from meteor.formatting import format_amount
from meteor.projector.file import count_parameters
from meteor.report import RunResult, StudyTable
from meteor.runs.folder import StageFolder
from meteor.runs.identity import identify, stages_of
from meteor.runs.mlflow_log import make_tracker, study_run
from meteor.runs.reading import StageRecord, read_stage
from meteor.stages import TRAINING_STAGES, Stage
from meteor.tracking import ChildRun

_LOG = logging.getLogger(__name__)
_FOLDER_TAG = "meteor.folder."


@dataclass(frozen=True)
class RunRecord:
    """Folders and numbers of one run of a study, as ``runs.json`` and MLflow keep them.

    Attributes:
        name: name of the run.
        variant: name of the variant, which all its seeds share.
        seed: seed of the run; None if the study names no seeds.
        folders: stage -> URI of the stage's folder.
        numbers: name -> number, see `meteor.report.study.numbers`.
        hardware: hardware on which answers were measured; "" if they were not.
    """

    name: str
    variant: str
    seed: int | None
    folders: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    hardware: str = ""

    def tags(self) -> dict[str, str]:
        """Return the tags of the MLflow run that the record can be read back from."""
        tags = {f"{_FOLDER_TAG}{stage}": uri for stage, uri in self.folders.items()}
        return tags | ({"meteor.hardware": self.hardware} if self.hardware else {})


def write_records(settings: RunSettings, records: Sequence[RunRecord]) -> None:
    """Write records to the study's folder, beside those of runs that ``--only`` excluded; they stand in for MLflow."""
    kept = _read_records(settings) | {record.name: record for record in records}
    write_checked_json(study_uri(settings, "runs.json"), {"runs": [asdict(record) for record in kept.values()]})


def find_records(settings: RunSettings) -> list[RunRecord]:
    """Find a study's runs in the order of its run file: in MLflow, or in the study's folder if MLflow knows none.

    Raises:
        SettingsError: the study has not run.
    """
    children: list[ChildRun] = []
    try:
        tracker = make_tracker(settings)
        children = tracker.children(study_run(tracker, settings))
    except TrackingError as error:
        _LOG.warning("%s. The study's runs are read from its folder instead", error)
    variants = [child for child in children if child.tags.get("meteor.kind") == "variant"]
    found = {child.name: _record(child.name, child.tags, child.metrics) for child in variants}
    found = found or _read_records(settings)
    names = [variant.settings.name for variant in expand_study(settings)]
    records = [found[name] for name in names if name in found]
    if not records:
        raise SettingsError(f"no variant of study {settings.name!r} has run: python -m pipelines.ablate --run ...")
    return records


def _record(name: str, tags: Mapping[str, str], metrics: Mapping[str, float]) -> RunRecord:
    seed = tags.get("meteor.seed")
    return RunRecord(
        name=name,
        variant=tags.get("meteor.variant", name),
        seed=None if seed is None else int(seed),
        folders={tag.removeprefix(_FOLDER_TAG): uri for tag, uri in tags.items() if tag.startswith(_FOLDER_TAG)},
        numbers=dict(metrics),
        hardware=tags.get("meteor.hardware", ""),
    )


def _read_records(settings: RunSettings) -> dict[str, RunRecord]:
    try:
        content = read_checked_json(study_uri(settings, "runs.json"))["runs"]
    except NotFoundError:
        return {}
    return {fields["name"]: RunRecord(**fields) for fields in content}


def find_folders(inputs: Inputs) -> dict[str, str]:
    """Return stage -> URI of its folder, for training stages that have started and an evaluation that has finished."""
    folders: dict[str, str] = {}
    for stage in stages_of(inputs.settings)[1:]:
        folder = find_folder(inputs, stage)
        if folder is not None and (folder.finished() if stage == "evaluate" else folder.started()):
            folders[stage] = folder.uri
    return folders


def find_folder(inputs: Inputs, stage: Stage) -> StageFolder | None:
    """Return a stage's folder; None, with a line in the log, if its identity cannot be found."""
    try:
        return StageFolder(inputs.settings.output, identify(inputs, stage))
    except MeteorError as error:
        _LOG.info("the report omits %s: %s", stage, error)
        return None


def collect(inputs: Inputs) -> RunResult:
    """Read the results of a run that belongs to no study."""
    name = inputs.settings.name
    return read_record(RunRecord(name, name, None, find_folders(inputs)))


def read_record(record: RunRecord, measured: Mapping[str, Any] | None = None) -> RunResult:
    """Read the results of a run from the folders of its stages; a folder that no longer exists is skipped with a warning.

    Args:
        record: folders and numbers of the run.
        measured: measurement of answers, if the record lacks it.
    """
    stages = {}
    for stage, uri in record.folders.items():
        try:
            stages[stage] = read_stage(uri)
        except NotFoundError as error:
            _LOG.warning("%s, %s: %s", record.name, stage, error)
    efficiency = _below("answers/", record.numbers)
    return read_result(
        record.name,
        stages,
        variant=record.variant,
        seed=record.seed,
        efficiency={**efficiency, "hardware": record.hardware} if efficiency else measured,
        encoder_shares=_below("encoder_share/", record.numbers),
        encoder_flops=_below("encoder_flops/", record.numbers),
        encoding_s=record.numbers.get("encoding_seconds"),
    )


def _below(prefix: str, numbers: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in numbers.items() if name.startswith(prefix)}


def read_result(name: str, stages: Mapping[str, StageRecord], **more: Any) -> RunResult:
    """Make a result from the records of its stages; read answers and scores if the evaluation has finished."""
    scores, predictions = _read_answers(name, stages.get("evaluate"))
    return RunResult(
        name=name,
        stages=stages,
        scores=scores,
        predictions=predictions,
        num_projector_parameters=_num_projector_parameters(stages),
        num_visual_tokens_per_image=_tokens_per_image(stages, more.get("efficiency")),
        **more,
    )


def _read_answers(
    name: str, evaluated: StageRecord | None
) -> tuple[dict[str, Any] | None, list[dict[str, Any]] | None]:
    """Read scores and answers of a finished evaluation; None if an earlier release wrote them in another form."""
    if evaluated is None or not evaluated.finished:
        return None, None
    scores = storage.read_json(storage.join(evaluated.uri, "scores.json"))
    if any("metric" not in table for table in scores.values()):
        _LOG.warning("%s: an earlier release scored %s, and the report omits it: evaluate again", name, evaluated.uri)
        return None, None
    content = storage.read_bytes(storage.join(evaluated.uri, "predictions.parquet"))
    return scores, pq.read_table(pa.BufferReader(content)).to_pylist()


def _num_projector_parameters(stages: Mapping[str, StageRecord]) -> int | None:
    """Count the projector's parameters, from the header of the file that stage 1 writes."""
    summary = stages["pretrain"].summary if "pretrain" in stages else None
    if not summary:
        return None
    return count_parameters(summary["results"]["projector"])


def _tokens_per_image(stages: Mapping[str, StageRecord], efficiency: Mapping[str, Any] | None) -> float | None:
    """Return the mean number of visual tokens per image in stage 2, separators excluded.

    Adaptive projectors use a share of their tokens; the number counts used tokens if the share was measured. An evaluation with
    other tokens than training (``evaluate.k``, ``evaluate.sub_images``) has a share of its own.
    """
    summary = stages["finetune"].summary if "finetune" in stages else None
    totals = summary["extra"]["totals"] if summary else None
    if not totals or not totals["images"]:
        return None
    answered = (stages["evaluate"].summary if "evaluate" in stages else None) or {}
    share = answered.get("extra", {}).get("visual_tokens_share", 1.0)
    return totals["visual_tokens"] / totals["images"] * share * (efficiency or {}).get("used_share", 1.0)


def unequal_samples(variants: Sequence[RunResult]) -> list[str]:
    """Return a sentence per stage in which runs used different numbers of samples, so that scores are not comparable."""
    sentences = []
    for stage in TRAINING_STAGES:
        counts = {
            run.name: run.stages[stage].summary["counts"]["samples"]  # type: ignore[index]
            for run in variants
            if stage in run.stages and run.stages[stage].finished
        }
        if len(set(counts.values())) > 1:
            least, most = (pick(counts, key=lambda name: counts[name]) for pick in (min, max))
            sentences.append(
                f"Not all variants were trained on the same samples in {stage}: {least} on {counts[least]:,}, {most} on "
                f"{counts[most]:,}. Training skips samples whose images take more tokens than {stage}.max_length."
            )
    return sentences


def unequal_workers(variants: Sequence[RunResult]) -> list[str]:
    """Return a sentence per stage that runs trained with different numbers of workers, so that times are not comparable."""
    sentences = []
    for stage in TRAINING_STAGES:
        counts = {
            run.name: run.stages[stage].settings.get("runtime", {}).get("num_workers", 1)
            for run in variants
            if stage in run.stages
        }
        if len(set(counts.values())) > 1:
            least, most = (pick(counts, key=lambda name: counts[name]) for pick in (min, max))
            sentences.append(
                f"Times of {stage} do not compare: {least} had {format_amount(counts[least], 'worker')}, {most} "
                f"{counts[most]}. A finished stage is found by what it computes, whatever its number of workers."
            )
    return sentences


def study_tables(settings: RunSettings) -> list[StudyTable]:
    """Return the tables that the study's settings define, by default one table of all variants.

    Raises:
        SettingsError: a table names a variant that does not exist.
    """
    if settings.study is None:
        return []
    names = list(dict.fromkeys(variant.name for variant in expand_study(settings)))
    if not settings.study.tables:
        return [StudyTable("All variants", tuple(names), names[0])]
    tables = []
    for title, options in settings.study.tables.items():
        rows = [name for pattern in options.variants or names for name in _matching(pattern, names, title)]
        control = options.control or rows[0]
        _matching(control, names, title)
        tables.append(StudyTable(title, tuple(dict.fromkeys([*rows, control])), control, options.paper, options.losses))
    return tables


def choose_variants(settings: RunSettings, only: Sequence[str]) -> list[str]:
    """Return the names of the variants that ``--only`` chooses.

    Args:
        settings: settings of the study.
        only: patterns of variants, or titles of tables; empty for all variants.

    Raises:
        SettingsError: an entry of ``only`` fits no variant and no table.
    """
    names = list(dict.fromkeys(variant.name for variant in expand_study(settings)))
    tables = {table.title: table.variants for table in study_tables(settings)}
    chosen = {
        name
        for choice in only or ["*"]
        for name in (tables[choice] if choice in tables else _matching(choice, names, "--only"))
    }
    return [name for name in names if name in chosen]


def _matching(pattern: str, names: Sequence[str], title: str) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise SettingsError(f"{title} names {pattern!r}, which fits none of the variants: {', '.join(names)}")
    return found
