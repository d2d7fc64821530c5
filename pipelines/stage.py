"""What all stages share: the command line, a stage's folder and its MLflow run, the summary that says it is finished."""

import argparse
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray.exceptions

import meteor
from meteor import storage
from meteor.cli.data import check_run
from meteor.config import RunSettings, load_run, resolve_paths
from meteor.errors import MeteorError, NotFoundError
from meteor.formatting import format_duration
from meteor.runs.mlflow_log import StageLog, has_server
from pipelines.ray_parts.logs import configure_logging, log_context
from pipelines.ray_parts.runtime import error_of_ours, job_metadata, ray_session

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What a finished stage says: counts, seconds, where the results are."""

    stage: str
    counts: dict[str, Any]
    seconds: float
    results: dict[str, str]
    reused: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def to_text(self) -> str:
        """A few aligned lines for the terminal."""
        head = "finished before, nothing to do" if self.reused else f"finished in {format_duration(self.seconds)}"
        rows = [*self.counts.items(), *self.results.items()]
        width = max((len(key) for key, _ in rows), default=0)
        lines = [f"  {key.replace('_', ' '):<{width}}  {_number(value)}" for key, value in rows]
        return "\n".join([f"{self.stage}: {head}", *lines])


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


class StageRun:
    """One stage of one run: a folder named by its digest, and an MLflow run found by the same digest."""

    def __init__(self, settings: RunSettings, stage: str, digest: str) -> None:
        self.settings, self.stage, self.digest = settings, stage, digest
        self.uri = storage.join(settings.output, "runs", f"{stage}-{digest[:12]}")

    def finished(self) -> Summary | None:
        """The summary of an earlier run of exactly this; None where it has not finished."""
        try:
            content = storage.read_json(storage.join(self.uri, "summary.json"))
        except NotFoundError:
            return None
        return Summary(**{**content, "reused": True})

    def start(self, **facts: Any) -> None:
        """Write ``run.json``: everything needed to repeat the run."""
        content = {
            "stage": self.stage,
            "name": self.settings.name,
            "variant": self.settings.name,
            "digest": self.digest,
            "settings": self.settings.model_dump(mode="json"),
            "git_commit": git_commit(),
            "versions": versions(),
            **facts,
        }
        storage.write_json(storage.join(self.uri, "run.json"), content)

    def finish(self, summary: Summary) -> Summary:
        """Write ``summary.json``, last: its existence means that the stage is complete."""
        content = {"stage": summary.stage, "counts": summary.counts, "seconds": summary.seconds}
        content |= {"results": summary.results, "extra": summary.extra}
        storage.write_json(storage.join(self.uri, "summary.json"), content)
        return summary

    @contextmanager
    def tracked(self, params: dict[str, Any]) -> Iterator[StageLog]:
        """What MLflow is told of the stage while the block runs: with its parameters, and ending as finished or failed.

        The server may be away: see `StageLog`.
        """
        tags = {"meteor.kind": "stage", "meteor.stage": self.stage, "meteor.variant": self.settings.name}
        tags |= {"meteor.folder": self.uri, "mlflow.source.git.commit": git_commit() or "unknown"}
        tags |= ray_tags()
        tracking = self.settings.tracking
        if tracking.study is not None:
            tags["meteor.study"] = tracking.study
        if tracking.used_by:
            tags["used_by"] = ", ".join(tracking.used_by)
        if job_metadata() and not has_server(self.settings):
            _LOG.warning(
                "MLflow: no server is set, and what this job writes to its own folder goes with it. Set MLFLOW_TRACKING_URI on "
                "all nodes, or tracking.uri"
            )
        log = StageLog.new(self.settings, self.stage, self.digest, self.uri, params=params, tags=tags)
        with log_context(variant=self.settings.name, stage=self.stage, run=self.digest[:12]):
            log.open()
            try:
                yield log
            except BaseException:
                log.close(failed=True)
                raise
            log.close(failed=False)

    def reuse(self, summary: Summary) -> Summary:
        """The summary of a finished run, after telling MLflow what an outage kept from it."""
        log = StageLog.unsent(self.settings, self.stage, self.digest, self.uri)
        if log is not None and log.settle():
            _LOG.info("%s: MLflow has been sent what it missed", self.stage)
        return summary


def ray_tags() -> dict[str, str]:
    """Tags that lead from MLflow to the Ray job of this process; none where it is no job's."""
    job = job_metadata()
    tags = {"ray.submission_id": job.get("job_submission_id"), "ray.dashboard": job.get("job_page")}
    return {name: value for name, value in tags.items() if value}


def git_commit() -> str | None:
    """The commit of the working directory; None outside a checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "transformers", "ray", "deepspeed", "pyarrow", "mlflow-skinny")
    return {"meteor": meteor.__version__, **{package: version(package) for package in packages}}


def stage_main(
    stage: str,
    description: str,
    run: Callable[[RunSettings], Summary],
    plan: Callable[[RunSettings], str],
    argv: Sequence[str] | None = None,
) -> int:
    """The command line of a stage; returns the exit status, see `guarded`."""
    arguments = stage_parser(stage, description).parse_args(argv)

    def act() -> int:
        settings = resolve_paths(load_run(arguments.run, arguments.overrides))
        if arguments.dry_run:
            report = check_run(settings)
            print(report.to_text(), end="\n\n")
            print(plan(settings))
            return 0 if report.ok else 1
        with ray_session(settings.runtime):
            print(run(settings).to_text())
        return 0

    return guarded(act)


def stage_parser(stage: str, description: str) -> argparse.ArgumentParser:
    """Options that all stages have."""
    parser = argparse.ArgumentParser(
        prog=f"python -m pipelines.{stage}",
        description=description,
        epilog="All settings with their meaning: meteor config explain",
    )
    parser.add_argument("--run", required=True, metavar="FILE", help="run file, or the name of one in jobs/runs/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that replace those of the run file")
    parser.add_argument("--dry-run", action="store_true", help="check the data, print the plan, do nothing")
    return parser


def guarded(act: Callable[[], int]) -> int:
    """Do it with our logging.

    Returns:
        Its status, or 1 after an error whose message was printed. Unexpected errors keep their traceback.
    """
    configure_logging()
    try:
        return act()
    # First, as an error of a remote task is of both classes, with Ray's text.
    except ray.exceptions.RayError as error:
        line = error_of_ours(error)
        if line is None:
            raise
        print(line, file=sys.stderr)
    except MeteorError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return 1


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Seconds since the start of the block."""
    started = time.perf_counter()
    yield lambda: time.perf_counter() - started


def canonical(content: Any) -> Any:
    """Through JSON and back: tuples become lists, so that digests of stored and fresh settings agree."""
    return json.loads(json.dumps(content, sort_keys=True, default=str))
