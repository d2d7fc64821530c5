"""A job server in memory, with the answers of Ray's."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from jobs import client


@dataclass
class FakeServer:
    """What `JobSubmissionClient` does, on a dictionary.

    Attributes:
        jobs: by submission id.
        ends: submission id's stage -> status that its job ends with; SUCCEEDED if not named.
        log: of every job.
        cuts: how many connections to a log break in the middle.
        absences: how many questions find nobody there.
        submitted: what was submitted.
    """

    jobs: dict[str, JobDetails] = field(default_factory=dict)
    ends: dict[str, JobStatus] = field(default_factory=dict)
    log: str = "first line\nsecond line\n"
    cuts: int = 0
    absences: int = 0
    submitted: list[dict[str, Any]] = field(default_factory=list)
    before_submitting: Callable[[str], None] = lambda submission_id: None

    def get_address(self) -> str:
        return "http://127.0.0.1:8265"

    def list_jobs(self) -> list[JobDetails]:
        return list(self.jobs.values())

    def submit_job(self, *, submission_id: str, **arguments: Any) -> str:
        self.before_submitting(submission_id)
        if submission_id in self.jobs:
            raise RuntimeError(f"Job with submission_id {submission_id} already exists")
        self.submitted.append({"submission_id": submission_id, **arguments})
        self.add(submission_id, JobStatus.RUNNING)
        return submission_id

    def add(self, submission_id: str, status: JobStatus) -> None:
        self.jobs[submission_id] = JobDetails(
            type=JobType.SUBMISSION, submission_id=submission_id, status=status, entrypoint="", message=""
        )

    async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
        yield self.log[:15]
        if self.cuts:
            self.cuts -= 1
            raise RuntimeError("WebSocket connection closed unexpectedly")
        yield self.log[15:]
        stage = submission_id.partition("-")[0]
        self.add(submission_id, self.ends.get(stage, JobStatus.SUCCEEDED))

    def get_job_info(self, submission_id: str) -> JobDetails:
        if self.absences:
            self.absences -= 1
            raise ConnectionError("connection refused")
        return self.jobs[submission_id]

    def get_job_logs(self, submission_id: str) -> str:
        return self.log


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    server = FakeServer()
    monkeypatch.setattr(client, "JobSubmissionClient", lambda address: server)
    monkeypatch.setattr(client, "_PAUSE_S", 0.0)
    return server
