"""What runs left behind, for the report: read from their folders, which MLflow names for the variants of a study."""

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
from meteor.config import RunSettings, expand_study
from meteor.errors import MeteorError, NotFoundError, SettingsError, TrackingError
from meteor.projector.file import count_parameters
from meteor.report import StudyTable, VariantResult
from meteor.runs.folder import StageFolder
from meteor.runs.identity import identify, stages_of
from meteor.runs.mlflow_log import make_tracker, study_run
from meteor.runs.reading import StageRecord, read_stage
from meteor.stages import Stage
from meteor.tracking import ChildRun

_LOG = logging.getLogger(__name__)
_FOLDER_TAG = "meteor.folder."


@dataclass(frozen=True)
class RunRecord:
    """Where one variant's stages are, and what was measured besides: a row of ``study.json``, and a run in MLflow.

    Attributes:
        name: of the run.
        variant: what its seeds share.
        seed: None where none was named.
        folders: stage -> URI of its run.
        numbers: by name, see `meteor.report.study.numbers`.
        hardware: that answers were measured on.
    """

    name: str
    variant: str
    seed: int | None
    folders: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    hardware: str = ""

    def tags(self) -> dict[str, str]:
        tags = {f"{_FOLDER_TAG}{stage}": uri for stage, uri in self.folders.items()}
        return tags | ({"meteor.hardware": self.hardware} if self.hardware else {})


def write_records(settings: RunSettings, records: Sequence[RunRecord]) -> None:
    """Keep them with the study, beside those of runs that were left out this time; MLflow may be away."""
    kept = _read_records(settings) | {record.name: record for record in records}
    storage.write_json(study_uri(settings, "runs.json"), [asdict(record) for record in kept.values()])


def find_records(settings: RunSettings) -> list[RunRecord]:
    """A study's runs in the order of its file: from MLflow, or where that knows none from the study's folder.

    Raises:
        SettingsError: the study has not run.
    """
    children: list[ChildRun] = []
    try:
        tracker = make_tracker(settings)
        children = tracker.children(study_run(tracker, settings))
    except TrackingError as error:
        _LOG.warning("%s. The study's own folder tells which runs it has", error)
    variants = [child for child in children if child.tags.get("meteor.kind") == "variant"]
    found = {child.name: _record(child.name, child.tags, child.metrics) for child in variants}
    found = found or _read_records(settings)
    records = [found[one.settings.name] for one in expand_study(settings) if one.settings.name in found]
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
        content = storage.read_json(study_uri(settings, "runs.json"))
    except NotFoundError:
        return {}
    return {one["name"]: RunRecord(**one) for one in content}


def find_folders(settings: RunSettings, inputs: Inputs) -> dict[str, str]:
    """Stage -> folder of one run's stages; left out are stages that have not started, or for evaluation not finished."""
    folders: dict[str, str] = {}
    for stage in stages_of(settings)[1:]:
        folder = find_folder(settings, stage, inputs)
        if folder is not None and (folder.finished() if stage == "evaluate" else folder.started()):
            folders[stage] = folder.uri
    return folders


def find_folder(settings: RunSettings, stage: Stage, inputs: Inputs) -> StageFolder | None:
    """A stage's folder; None, with a line in the log, if its identity cannot be told."""
    try:
        return StageFolder(settings.output, identify(settings, stage, inputs))
    except MeteorError as error:
        _LOG.info("%s is left out of the report: %s", stage, error)
        return None


def collect(settings: RunSettings, inputs: Inputs) -> VariantResult:
    """Everything that the stages of a run outside any study left behind."""
    return read_record(RunRecord(settings.name, settings.name, None, find_folders(settings, inputs)))


def read_record(record: RunRecord, measured: Mapping[str, Any] | None = None) -> VariantResult:
    """Everything that a variant's stages left in their folders; a folder that is gone is left out.

    ``measured``: what answering costs, where the record does not have it yet.
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
    )


def _below(prefix: str, numbers: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in numbers.items() if name.startswith(prefix)}


def read_result(name: str, stages: Mapping[str, StageRecord], **more: Any) -> VariantResult:
    """A variant from its stages' runs; answers and scores are read where evaluation has finished."""
    scores, predictions = _read_answers(name, stages.get("evaluate"))
    return VariantResult(
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
    """Scores and answers of a finished evaluation; those that an earlier release wrote in another form are left out."""
    if evaluated is None or not evaluated.finished:
        return None, None
    scores = storage.read_json(storage.join(evaluated.uri, "scores.json"))
    if any("metric" not in table for table in scores.values()):
        _LOG.warning("%s: %s was scored by an earlier release and is left out: evaluate again", name, evaluated.uri)
        return None, None
    content = storage.read_bytes(storage.join(evaluated.uri, "predictions.parquet"))
    return scores, pq.read_table(pa.BufferReader(content)).to_pylist()


def _num_projector_parameters(stages: Mapping[str, StageRecord]) -> int | None:
    """Counted in stage 1's own file, from its header."""
    summary = stages["pretrain"].summary if "pretrain" in stages else None
    if not summary:
        return None
    return count_parameters(summary["results"]["projector"])


def _tokens_per_image(stages: Mapping[str, StageRecord], efficiency: Mapping[str, Any] | None) -> float | None:
    """Mean visual tokens of an image in stage 2, separators left out; of adaptive projectors the share that was used."""
    summary = stages["finetune"].summary if "finetune" in stages else None
    totals = summary["extra"]["totals"] if summary else None
    if not totals or not totals["images"]:
        return None
    return totals["visual_tokens"] / totals["images"] * (efficiency or {}).get("used_share", 1.0)


def unequal_samples(variants: Sequence[VariantResult]) -> list[str]:
    """A sentence for each stage whose runs did not train on as many samples: their scores do not compare."""
    sentences = []
    for stage in ("pretrain", "finetune"):
        counts = {
            run.name: run.stages[stage].summary["counts"]["samples"]  # type: ignore[index]
            for run in variants
            if stage in run.stages and run.stages[stage].finished
        }
        if len(set(counts.values())) > 1:
            least, most = (pick(counts, key=lambda name: counts[name]) for pick in (min, max))
            sentences.append(
                f"Not all variants were trained on the same samples in {stage}: {least} on {counts[least]:,}, {most} on "
                f"{counts[most]:,}. Samples whose images take more tokens than {stage}.max_length has are left out."
            )
    return sentences


def study_tables(settings: RunSettings) -> list[StudyTable]:
    """The tables that a study asks for; one of all variants where it names none.

    Raises:
        SettingsError: a table names a variant that there is not.
    """
    if settings.study is None:
        return []
    names = list(dict.fromkeys(variant.name for variant in expand_study(settings)))
    if not settings.study.tables:
        return [StudyTable("All variants", tuple(names), names[0])]
    tables = []
    for title, wanted in settings.study.tables.items():
        rows = [name for pattern in wanted.variants or names for name in _matching(pattern, names, title)]
        control = wanted.control or rows[0]
        _matching(control, names, title)
        tables.append(StudyTable(title, tuple(dict.fromkeys([*rows, control])), control, wanted.paper))
    return tables


def choose_variants(settings: RunSettings, wanted: Sequence[str]) -> list[str]:
    """Names of the variants that patterns or titles of tables name; all where nothing is wanted.

    Raises:
        SettingsError: there is no such variant and no such table.
    """
    names = list(dict.fromkeys(variant.name for variant in expand_study(settings)))
    tables = {table.title: table.variants for table in study_tables(settings)}
    chosen = {
        name for one in wanted or ["*"] for name in (tables[one] if one in tables else _matching(one, names, "--only"))
    }
    return [name for name in names if name in chosen]


def _matching(pattern: str, names: Sequence[str], title: str) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise SettingsError(f"{title} names {pattern!r}, and the variants are {', '.join(names)}")
    return found
