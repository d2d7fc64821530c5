"""From a stage and a run to a job: its command, what it needs, and an id that tells it from all others."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from meteor.config import RunSettings, expand_study, load_run, settings_digest
from meteor.errors import SettingsError
from meteor.runs.identity import NamesAlone, identify, identify_all, stages_of
from meteor.stages import STAGES
from meteor.tracking import experiment_page

CHAIN = (*STAGES, "report")
_SPECS = Path(__file__).with_name("stages.yaml")
_MODULES = {"preflight": "jobs.preflight"}


@dataclass(frozen=True)
class Resources:
    """What the driver of a stage's job asks for (`jobs/stages.yaml`).

    Attributes:
        entrypoint_num_cpus, entrypoint_num_gpus, entrypoint_memory: logical resources; memory in bytes. All 0: the head node.
        entrypoint_resources: custom resources, for example of a group of nodes.
        env_vars: of the driver and all workers. Never a secret.
    """

    entrypoint_num_cpus: float = 0
    entrypoint_num_gpus: float = 0
    entrypoint_memory: int = 0
    entrypoint_resources: dict[str, float] = field(default_factory=dict)
    env_vars: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One stage of one run.

    Attributes:
        stage: its name.
        run: run file, or the name of one, as it was given.
        overrides: ``a.b=value``.
        settings: all of it resolved.
        resources: of the driver.
    """

    stage: str
    run: str
    overrides: tuple[str, ...]
    settings: RunSettings
    resources: Resources

    @property
    def entrypoint(self) -> str:
        """The command, as it would be typed in the working directory."""
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
            content: Any = identify(settings, self.stage, NamesAlone()).digest
        else:
            runs = [variant.settings for variant in expand_study(settings)] if settings.study else [settings]
            stages = [[identity.digest for identity in identify_all(run, NamesAlone()).values()] for run in runs]
            content = [settings.name, stages]
        return settings_digest([self.stage, content, settings.output, settings.cache_root])[:12]

    def tracking_page(self, submission_id: str) -> str | None:
        """Where MLflow has the job's run: found by the tag that the stage puts on it; None where no server answers here."""
        uri = self.settings.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        return experiment_page(uri, self.settings.tracking.experiment, {"ray.submission_id": submission_id})

    def submission_id(self, attempt: int) -> str:
        """Ray takes each id once, also after a failure: every attempt has its own."""
        return f"{self.stage}-{self.digest}-{attempt}"


def make_job(stage: str, run: str, overrides: Sequence[str] = ()) -> Job:
    """The job of a stage.

    Raises:
        SettingsError: no such stage or run file, or the run file does not travel with the working directory.
    """
    specs = read_specs()
    if stage not in specs:
        raise SettingsError(f"there is no stage {stage!r}; known are {', '.join(specs)}, and all")
    file = Path(run)
    if file.is_file() and not file.resolve().is_relative_to(Path.cwd().resolve()):
        raise SettingsError(
            f"the run file {run} lies outside the working directory {Path.cwd()}, which is all that the cluster gets: copy it "
            "below jobs/runs/"
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
    """Stage -> resources. Raises SettingsError where the file has something that is none."""
    try:
        return TypeAdapter(dict[str, Resources]).validate_python(yaml.safe_load(_SPECS.read_text()))
    except (ValidationError, yaml.YAMLError) as error:
        raise SettingsError(f"{_SPECS}: {error}") from error
