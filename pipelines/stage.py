"""What all stages share: the command line, a stage's folder and its MLflow run, the summary that says it is finished."""

import argparse
import json
import logging
import os
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
from meteor.cache import FeatureCache
from meteor.cli.data import check_run
from meteor.config import RunSettings, load_run, resolve_paths, settings_digest
from meteor.errors import MeteorError, NotFoundError
from meteor.formatting import format_duration
from meteor.tracking import Tracker
from pipelines.runtime import configure_logging, error_of_ours, ray_session

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
    def tracked(self, params: dict[str, Any]) -> Iterator[tuple[Tracker, str, str]]:
        """The stage's MLflow run under the pipeline's, with its parameters; ends as finished or failed.

        Yields:
            The tracker, the stage's run id and the pipeline's.
        """
        tracker = make_tracker(self.settings)
        parent = tracker.run(self.settings.name, pipeline_digest(self.settings), tags={"meteor.kind": "pipeline"})
        tags = {"meteor.kind": "stage", "meteor.stage": self.stage, "meteor.variant": self.settings.name}
        tags |= {"meteor.folder": self.uri, "mlflow.source.git.commit": git_commit() or "unknown"}
        run_id = tracker.run(f"{self.settings.name} {self.stage}", self.digest, parent=parent, tags=tags)
        # On the pipeline's run as well: comparing two variants in MLflow then needs no search for their stages.
        for one in (run_id, parent):
            tracker.log_params(one, params)
        try:
            yield tracker, run_id, parent
        except BaseException:
            tracker.finish(run_id, failed=True)
            raise
        tracker.finish(run_id)
        tracker.finish(parent)


def log_cache(tracker: Tracker, run_id: str, cache: FeatureCache, *, context: str) -> None:
    """Name the cache version as an input: searching MLflow for ``dataset.name = '<cache key>'`` finds all its runs."""
    tracker.log_dataset(run_id, name=cache.identity.key, digest=cache.digest, source=cache.uri, context=context)


def pipeline_digest(settings: RunSettings) -> str:
    """What the stages of one run share in MLflow."""
    return settings_digest({"name": settings.name, "output": settings.output})


def make_tracker(settings: RunSettings) -> Tracker:
    return Tracker(tracking_uri(settings), settings.tracking.experiment)


def tracking_uri(settings: RunSettings) -> str:
    """The setting, else MLFLOW_TRACKING_URI, else SQLite beside the results (in the working directory for s3 outputs)."""
    folder = "." if "://" in settings.output else settings.output
    return (
        settings.tracking.uri
        or os.environ.get("MLFLOW_TRACKING_URI")
        or f"sqlite:///{storage.absolute(folder)}/mlflow.db"
    )


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
    """The command line of a stage.

    Returns:
        0, or 1 after an error whose message was printed. Unexpected errors keep their traceback.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m pipelines.{stage}",
        description=description,
        epilog="All settings with their meaning: meteor config explain",
    )
    parser.add_argument("--run", required=True, metavar="FILE", help="run file, or the name of one in jobs/runs/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that replace those of the run file")
    parser.add_argument("--dry-run", action="store_true", help="check the data, print the plan, do nothing")
    arguments = parser.parse_args(argv)
    configure_logging()
    try:
        settings = resolve_paths(load_run(arguments.run, arguments.overrides))
        if arguments.dry_run:
            report = check_run(settings)
            print(f"{report.to_text()}\n\n{plan(settings)}")
            return 0 if report.ok else 1
        with ray_session(settings.runtime):
            print(run(settings).to_text())
    # First, as an error of a remote task is of both classes, with Ray's text.
    except ray.exceptions.RayError as error:
        line = error_of_ours(error)
        if line is None:
            raise
        print(line, file=sys.stderr)
        return 1
    except MeteorError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Seconds since the start of the block."""
    started = time.perf_counter()
    yield lambda: time.perf_counter() - started


def canonical(content: Any) -> Any:
    """Through JSON and back: tuples become lists, so that digests of stored and fresh settings agree."""
    return json.loads(json.dumps(content, sort_keys=True, default=str))
