"""Client of Ray's job server: a stage of a run has one job at a time, which is followed even over broken connections."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from jobs.spec import Job
from jobs.upload import require_small
from meteor.clusters import require_listener
from meteor.errors import ClusterError, SettingsError
from meteor.formatting import shorten
from meteor.secrets import redact

# Seconds without an answer before a cluster is given up; a restarted head or a laptop after sleep is back in minutes.
_PATIENCE_S = 600.0
_PAUSE_S = 2.0
_LONGEST_SHOWN = 300
# Exceptions by which Ray's client and aiohttp report a lost connection.
_LOST = (aiohttp.ClientError, ConnectionError, OSError, RuntimeError, TimeoutError)


class JobServer:
    """Job server of a cluster.

    Args:
        address: address of the dashboard; RAY_API_SERVER_ADDRESS, RAY_ADDRESS or this machine's cluster if None.

    Raises:
        ClusterError: nothing answers at the address, or the server requires another token.
    """

    def __init__(self, address: str | None = None) -> None:
        named = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
        with _telling(named or "the default address"):
            if named:
                require_listener(named)
            self._client = JobSubmissionClient(address)
        self.address = self._client.get_address()

    def page(self, submission_id: str) -> str:
        """Return the address of a job's page in the dashboard."""
        return f"{self.address}/#/jobs/{submission_id}"

    def submit(self, job: Job) -> tuple[str, bool]:
        """Submit a job, or find it if it is running already.

        Returns:
            The submission id, and whether the job is new.

        Raises:
            SettingsError: the cluster refuses the job, or the working directory is too large to be uploaded.
            ClusterError: the cluster does not answer any more.
        """
        require_small(Path("."))
        while True:
            with _telling(self.address):
                attempts = self._attempts(job)
            running = [details for details in attempts.values() if not details.status.is_terminal()]
            if running:
                return str(running[-1].submission_id), False
            submission_id = job.submission_id(max(attempts, default=0) + 1)
            try:
                return self._submit(job, submission_id), True
            except OSError as error:
                raise ClusterError(
                    f"{self.address} does not answer any more: {error}. Run the command again"
                ) from error
            except RuntimeError as error:
                # Another user submitted the same id a moment earlier; the next round finds that job running.
                if "already exists" not in str(error):
                    raise SettingsError(f"the cluster refuses {submission_id}: {error}") from error

    def _attempts(self, job: Job) -> dict[int, JobDetails]:
        """Return the job's attempts on the cluster by number, in order."""
        prefix, found = job.submission_id(0)[:-1], {}
        for details in self._client.list_jobs():
            number = (details.submission_id or "").removeprefix(prefix)
            if number.isdecimal():
                found[int(number)] = details
        return dict(sorted(found.items()))

    def _submit(self, job: Job, submission_id: str) -> str:
        resources = vars(job.resources).copy()
        env_vars = resources.pop("env_vars")
        metadata = {
            "job_name": f"{job.settings.name} {job.stage}",  # shown as a column in the dashboard's list of jobs
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
            metadata={name: redact(value) for name, value in metadata.items()},
            **{name: value for name, value in resources.items() if value},
        )

    def follow(self, submission_id: str, write: Callable[[str], Any]) -> JobDetails:
        """Pass the job's log on until the job ends, each character once, even over broken connections.

        Args:
            submission_id: id of the job.
            write: callback for parts of the log.

        Returns:
            Details of the ended job.

        Raises:
            ClusterError: the cluster has not answered for ten minutes, or does not know the job any more.
        """
        num_written, lost_since = 0, None

        def pass_on(text: str, start: int) -> None:
            nonlocal num_written
            if start + len(text) > num_written:
                write(text[max(num_written - start, 0) :])
                num_written = start + len(text)

        async def tail() -> None:
            # Ray sends the log from its beginning on each connection.
            position = 0
            async for text in self._client.tail_job_logs(submission_id):
                pass_on(text, position)
                position += len(text)

        while True:
            # Proxies cut idle connections, so a lost connection alone means nothing; the query below checks the cluster.
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
                        f"{self.address} does not know {submission_id} any more: its head has restarted. Run the command again "
                        "to continue where the job stopped"
                    ) from error
                now_s = time.monotonic()
                if lost_since is None:
                    lost_since = now_s
                    write(f"[{self.address} does not answer ({error}); the job continues, trying again]\n")
                if now_s - lost_since >= _PATIENCE_S:
                    raise ClusterError(
                        f"{self.address} has not answered for {_PATIENCE_S / 60:.0f} minutes. Run the command again to look "
                        f"for the job {submission_id}"
                    ) from error
            time.sleep(_PAUSE_S)


@contextmanager
def _telling(address: str) -> Iterator[None]:
    """Turn the errors of Ray's client into `ClusterError`, with the cure."""
    try:
        yield
    # A wrong token is an error of Ray's own tree.
    except (ClusterError, OSError, RuntimeError, ValueError, RayError) as error:
        said = shorten(" ".join(str(error).split()), _LONGEST_SHOWN).rstrip(".")
        raise ClusterError(
            f"no Ray cluster answers at {address}, or it asks for a token: {said}. Give --address http://HOST:8265; for a "
            "cluster on Kubernetes first run `kubectl port-forward service/NAME-head-svc 8265`. If the cluster requires a "
            "token, put it into RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from error


def exit_status(details: JobDetails) -> int:
    """Return 0 if the job succeeded, 143 (128 + SIGTERM) if it was stopped, and its driver's status (or 1) if it failed."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return 143
    return details.driver_exit_code or 1
