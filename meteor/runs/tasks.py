"""Stages of several runs as tasks: a stage that is the same in several runs is one task."""

from collections.abc import Sequence
from dataclasses import dataclass

from meteor.config import RunSettings
from meteor.runs.folder import StageFolder
from meteor.runs.identity import Facts, StageIdentity, identify_all


@dataclass(frozen=True)
class Task:
    """One stage of one or several runs.

    Attributes:
        identity: identity of the stage.
        settings: settings of the first run; a shared stage has a name of its own, as it belongs to no single run.
        used_by: names of the runs that need the stage.
        needs: keys of the tasks that must finish before.
    """

    identity: StageIdentity
    settings: RunSettings
    used_by: tuple[str, ...]
    needs: tuple[str, ...]

    @property
    def key(self) -> str:
        """Key of the task, equal for stages that are the same."""
        return self.identity.digest

    @property
    def stage(self) -> str:
        return self.identity.stage

    @property
    def folder(self) -> StageFolder:
        return StageFolder(self.settings.output, self.identity)

    @property
    def label(self) -> str:
        """Name of the task in messages."""
        if len(self.used_by) == 1:
            return f"{self.used_by[0]}, {self.stage}"
        return f"{self.stage} of {self.used_by[0]} and {len(self.used_by) - 1} more"


def make_tasks(runs: Sequence[Facts]) -> dict[str, Task]:
    """Return key -> task in the order of the runs, which have different names; the stages of a run follow each other."""
    chains = {run.settings.name: list(identify_all(run).values()) for run in runs}
    users: dict[str, list[str]] = {}
    for name, chain in chains.items():
        for identity in chain:
            users.setdefault(identity.digest, []).append(name)
    tasks: dict[str, Task] = {}
    for run in runs:
        needs: tuple[str, ...] = ()
        for identity in chains[run.settings.name]:
            used_by = tuple(users[identity.digest])
            tasks.setdefault(identity.digest, Task(identity, _shared(run.settings, identity, used_by), used_by, needs))
            needs = (identity.digest,)
    return tasks


def _shared(settings: RunSettings, identity: StageIdentity, used_by: tuple[str, ...]) -> RunSettings:
    """Return the settings of a task; a stage that several runs share gets a name of its own."""
    if len(used_by) == 1:
        return settings
    tracking = settings.tracking.model_copy(update={"used_by": used_by})
    return settings.model_copy(update={"tracking": tracking, "name": f"shared-{identity.digest[:6]}"})
