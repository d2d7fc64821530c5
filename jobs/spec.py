"""Jobs of a run's stages: command, resources, and an id that identifies what is computed."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from meteor.config import RunSettings, expand_study, load_run, settings_digest
from meteor.config.yaml_text import read_yaml
from meteor.errors import SettingsError
from meteor.runs.identity import NamesAlone, identify, identify_all, stages_of
from meteor.stages import STAGES
from meteor.tracking import experiment_page

# Stages in the order in which a run executes them.
CHAIN = (*STAGES, "report")
_SPECS = Path(__file__).with_name("stages.yaml")
_MODULES = {"preflight": "jobs.preflight"}


@dataclass(frozen=True)
class Resources:
    """Resources for the driver of a stage's job (`jobs/stages.yaml`).

    Attributes:
        entrypoint_num_cpus, entrypoint_num_gpus, entrypoint_memory: logical resources, memory in bytes. If all are 0, the
            driver runs on the head node.
        entrypoint_resources: custom resources, for example those of a group of nodes.
        env_vars: environment variables of the driver and all workers; never secrets.
    """

    entrypoint_num_cpus: float = 0
    entrypoint_num_gpus: float = 0
    entrypoint_memory: int = 0
    entrypoint_resources: dict[str, float] = field(default_factory=dict)
    env_vars: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """Job of one stage of one run.

    Attributes:
        stage: name of the stage.
        run: run file, or the name of a run file in jobs/runs/, as given by the user.
        overrides: changed settings of the form ``a.b=value``.
        settings: resolved settings of the run.
        resources: resources of the driver.
    """

    stage: str
    run: str
    overrides: tuple[str, ...]
    settings: RunSettings
    resources: Resources

    @property
    def entrypoint(self) -> str:
        """Command of the driver, as typed in the working directory."""
        module = _MODULES.get(self.stage, f"pipelines.{self.stage}")
        return shlex.join(["python", "-m", module, "--run", self.run, *self.overrides])

    @property
    def digest(self) -> str:
        """12 hexadecimal digits that name what the job computes, and where it leaves the results.

        It is made of `meteor.runs.identity`, by names alone: the machine that submits need not see the files. Worker counts
        change nothing, so that a second try with fewer workers follows the first and never runs beside it.
        """
        settings = self.settings
        if self.stage in STAGES:
            content: Any = identify(NamesAlone(settings), self.stage).digest
        else:
            runs = [variant.settings for variant in expand_study(settings)] if settings.study else [settings]
            stages = [[identity.digest for identity in identify_all(NamesAlone(run)).values()] for run in runs]
            content = [settings.name, stages]
        return settings_digest([self.stage, content, settings.output, settings.cache_root])[:12]

    def tracking_page(self, submission_id: str) -> str | None:
        """Return the MLflow page of the job's run, found by a tag that the stage sets; None if no server answers."""
        uri = self.settings.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        return experiment_page(uri, self.settings.tracking.experiment, {"ray.submission_id": submission_id})

    def submission_id(self, attempt: int) -> str:
        """Return the id of an attempt; Ray accepts each id only once, even after a failure."""
        return f"{self.stage}-{self.digest}-{attempt}"


def make_job(stage: str, run: str, overrides: Sequence[str] = ()) -> Job:
    """Make the job of a stage.

    Args:
        stage: name of the stage.
        run: run file, or the name of a run file in jobs/runs/.
        overrides: changed settings of the form ``a.b=value``.

    Raises:
        SettingsError: the stage or run file does not exist, or the run file lies outside the working directory, which is all
            that the cluster gets.
    """
    specs = read_specs()
    if stage not in specs:
        raise SettingsError(f"there is no stage {stage!r}; known are {', '.join(specs)}, and all")
    file = Path(run)
    if file.is_file() and not file.resolve().is_relative_to(Path.cwd().resolve()):
        raise SettingsError(
            f"the run file {run} lies outside the working directory {Path.cwd()}, and the cluster gets only that directory: "
            "copy the file below jobs/runs/"
        )
    if file.is_file():
        run = str(file.resolve().relative_to(Path.cwd().resolve()))
    return Job(stage, run, tuple(overrides), load_run(run, overrides), specs[stage])


def make_chain(run: str, overrides: Sequence[str] = ()) -> list[Job]:
    """Every stage of a run, and of those it is compared with, then the report."""
    last = make_job("report", run, overrides)
    jobs = []
    for name, changes in [(run, overrides), *((other, ()) for other in last.settings.report.compare)]:
        jobs += [make_job(stage, name, changes) for stage in stages_of(load_run(name, changes))]
    return [*jobs, last]


def read_specs() -> dict[str, Resources]:
    """Read the resources of each stage.

    Raises:
        SettingsError: the file is malformed.
    """
    try:
        return TypeAdapter(dict[str, Resources]).validate_python(read_yaml(_SPECS.read_text(), str(_SPECS)))
    except (ValidationError, SettingsError) as error:
        raise SettingsError(f"{_SPECS}: {error}") from error
