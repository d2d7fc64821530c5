"""Folder of a stage: a record of how the stage was started, and a summary that means it has finished."""

import importlib.metadata
import subprocess
from dataclasses import dataclass, field
from typing import Any

import meteor
from meteor import storage
from meteor.checksums import CHECKSUMS, read_checked_json, write_checked_json, write_checksums
from meteor.config import RunSettings
from meteor.errors import NotFoundError
from meteor.formatting import format_duration
from meteor.runs.claim import Claim
from meteor.runs.identity import StageIdentity

_PACKAGES = ("torch", "transformers", "ray", "deepspeed", "pyarrow", "mlflow-skinny")


@dataclass(frozen=True)
class Summary:
    """Result of a finished stage.

    Attributes:
        stage: name of the stage.
        counts: numbers for the terminal and MLflow, in the order of the lines.
        seconds: duration since the last start.
        results: name -> URI of a file or folder that the stage writes.
        reused: whether the stage had finished before this start.
        extra: more numbers, for the report and for `meteor plan`.
    """

    stage: str
    counts: dict[str, Any]
    seconds: float
    results: dict[str, str]
    reused: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def to_text(self) -> str:
        """Return aligned lines for the terminal."""
        head = "finished before, nothing to do" if self.reused else f"finished in {format_duration(self.seconds)}"
        rows = [*self.counts.items(), *self.results.items()]
        width = max((len(key) for key, _ in rows), default=0)
        lines = [f"  {key.replace('_', ' '):<{width}}  {_number(value)}" for key, value in rows]
        return "\n".join([f"{self.stage}: {head}", *lines])


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


class StageFolder:
    """Folder of one stage below ``<output>/runs``, named by the stage's identity.

    Args:
        output: root of everything the run writes.
        identity: identity of the stage.
    """

    def __init__(self, output: str, identity: StageIdentity) -> None:
        self.identity = identity
        self._claim: Claim | None = None
        self.uri = storage.join(output, "runs", identity.name)

    @property
    def stage(self) -> str:
        return self.identity.stage

    @property
    def digest(self) -> str:
        return self.identity.digest

    def started(self) -> bool:
        """Return whether the stage was started before: ``run.json`` exists."""
        return storage.exists(storage.join(self.uri, "run.json"))

    def finished(self) -> Summary | None:
        """Return the summary if the stage has finished, else None.

        Raises:
            DamagedError: the summary is not what was written.
        """
        try:
            content = read_checked_json(storage.join(self.uri, "summary.json"))
        except NotFoundError:
            return None
        return Summary(**{**content, "reused": True})

    @property
    def claim(self) -> Claim:
        """Claim of this start on the folder; exists after `start`."""
        assert self._claim is not None, "the stage has not been started"
        return self._claim

    def check_claim(self) -> None:
        """Raise SupersededError if this start has claimed the folder and a newer one has taken it over."""
        if self._claim is not None:
            self._claim.check()

    def start(self, settings: RunSettings, *, job: str = "", **facts: Any) -> None:
        """Claim the folder and write ``run.json``: everything that is needed to repeat the stage, and more ``facts`` about it.

        Args:
            settings: settings of the run.
            job: name of the job of this process, for messages of other starts; "" if there is none.
            **facts: JSON values.
        """
        self._claim = Claim.take(self.uri, stage=self.stage, job=job)
        content = {
            "stage": self.stage,
            "name": settings.name,
            "digest": self.digest,
            "settings": settings.model_dump(mode="json"),
            "git_commit": git_commit(),
            "versions": installed_versions(),
            **facts,
        }
        write_checked_json(storage.join(self.uri, "run.json"), content)

    def finish(self, summary: Summary) -> Summary:
        """Write ``checksums.json`` and ``summary.json``. The summary is the last file: it means that the stage is complete.

        Raises:
            SupersededError: a newer start has claimed the folder.
        """
        self.check_claim()
        write_checksums(self.uri, leave_out=_has_own_checksum)
        content = {"stage": summary.stage, "counts": summary.counts, "seconds": summary.seconds}
        content |= {"results": summary.results, "extra": summary.extra}
        write_checked_json(storage.join(self.uri, "summary.json"), content)
        return summary


def _has_own_checksum(name: str) -> bool:
    """Return whether a file of a stage's folder is not for ``checksums.json``.

    Checkpoints and a model's folder have lists of their own, as metrics have in the summary. The other files change after the
    end of the stage.
    """
    folder, _, below = name.partition("/")
    if folder == "model":
        return below not in {CHECKSUMS, "projector.safetensors"}
    return folder in {"attempts", "checkpoints", "metrics", "failures"} or name in {"tracking.json", "summary.json"}


def git_commit() -> str | None:
    """Return the git commit of the working directory; None outside a checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def installed_versions() -> dict[str, str]:
    """Return package -> version of this project and of the packages that decide about numbers, without absent ones."""
    found = {"meteor": meteor.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
