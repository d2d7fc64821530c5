"""Ray's job server: one job for a stage of a run at a time, followed until it ends, over broken connections too."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import aiohttp
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from jobs.spec import Job
from meteor.errors import ClusterError, SettingsError

# A head that restarts, or a laptop that wakes up, is back within minutes.
_PATIENCE_S = 600.0
_PAUSE_S = 2.0
# Everything that a lost connection shows as.
_LOST = (aiohttp.ClientError, ConnectionError, OSError, RuntimeError, TimeoutError)


class JobServer:
    """The jobs of a cluster.

    Args:
        address: of the dashboard; RAY_API_SERVER_ADDRESS, RAY_ADDRESS or this machine's cluster if None.

    Raises:
        ClusterError: nothing answers there, or it wants another token.
    """

    def __init__(self, address: str | None = None) -> None:
        try:
            self._client = JobSubmissionClient(address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"no Ray cluster answers at {address or 'the default address'}: {error}\nGive --address http://HOST:8265; for "
                "a cluster on Kubernetes first `kubectl port-forward service/NAME-head-svc 8265`. Where it asks for a "
                "token, put it into RAY_AUTH_TOKEN or ~/.ray/auth_token."
            ) from error
        self.address = self._client.get_address()

    def page(self, submission_id: str) -> str:
        """The job's page in the dashboard."""
        return f"{self.address}/#/jobs/{submission_id}"

    def submit(self, job: Job) -> tuple[str, bool]:
        """Submit a job; or find it where it runs already.

        Returns:
            The submission id, and whether it is new.
        """
        while True:
            attempts = self._attempts(job)
            running = [one for one in attempts.values() if not one.status.is_terminal()]
            if running:
                return str(running[-1].submission_id), False
            submission_id = job.submission_id(max(attempts, default=0) + 1)
            try:
                return self._submit(job, submission_id), True
            except RuntimeError as error:
                # Somebody else was faster by a moment: theirs is running now.
                if "already exists" not in str(error):
                    raise SettingsError(f"the cluster refuses {submission_id}: {error}") from error

    def _attempts(self, job: Job) -> dict[int, JobDetails]:
        """Attempt -> job, in order."""
        prefix, found = job.submission_id(0)[:-1], {}
        for one in self._client.list_jobs():
            number = (one.submission_id or "").removeprefix(prefix)
            if number.isdecimal():
                found[int(number)] = one
        return dict(sorted(found.items()))

    def _submit(self, job: Job, submission_id: str) -> str:
        resources = vars(job.resources).copy()
        env_vars = resources.pop("env_vars")
        metadata = {
            "job_name": f"{job.settings.name} {job.stage}",  # a column of the dashboard's list
            "run": job.settings.name,
            "stage": job.stage,
            "digest": job.digest,
            "job_page": self.page(submission_id),
        }
        if (tracking := job.tracking_page(submission_id)) is not None:
            metadata["mlflow"] = tracking
        return self._client.submit_job(
            entrypoint=job.entrypoint,
            submission_id=submission_id,
            runtime_env={"working_dir": ".", "env_vars": env_vars},
            metadata=metadata,
            **{name: value for name, value in resources.items() if value},
        )

    def follow(self, submission_id: str, write: Callable[[str], Any]) -> JobDetails:
        """Pass the job's log on as it grows until the job ends; each character once, over broken connections too.

        Raises:
            ClusterError: the cluster has not answered for ten minutes, or has forgotten the job.
        """
        num_written, lost_since = 0, None

        def pass_on(text: str, start: int) -> None:
            nonlocal num_written
            if start + len(text) > num_written:
                write(text[max(num_written - start, 0) :])
                num_written = start + len(text)

        async def tail() -> None:
            # Each connection starts at the log's beginning.
            position = 0
            async for text in self._client.tail_job_logs(submission_id):
                pass_on(text, position)
                position += len(text)

        while True:
            # Proxies cut connections on which nothing is said; whether the cluster is there is asked below.
            with suppress(*_LOST):
                asyncio.run(tail())
            try:
                details = self._client.get_job_info(submission_id)
                lost_since = None
                if details.status.is_terminal():
                    pass_on(self._client.get_job_logs(submission_id), 0)
                    return details
            except _LOST as error:
                if "does not exist" in str(error):
                    raise ClusterError(
                        f"{self.address} does not know {submission_id} any more: its head has started anew. The same command "
                        "goes on where the job stopped"
                    ) from error
                now_s = time.monotonic()
                if lost_since is None:
                    lost_since = now_s
                    write(f"[{self.address} does not answer ({error}); the job goes on, trying again]\n")
                if now_s - lost_since >= _PATIENCE_S:
                    raise ClusterError(
                        f"{self.address} has not answered for {_PATIENCE_S / 60:.0f} minutes. The same command looks for "
                        f"the job {submission_id} again"
                    ) from error
            time.sleep(_PAUSE_S)


def exit_status(details: JobDetails) -> int:
    """0 if the job succeeded; its driver's own status, or 1, if it failed; 143 (128 + SIGTERM) if it was stopped."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return 143
    return details.driver_exit_code or 1
