"""Submission of a run's stages to a Ray cluster."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from jobs.client import JobServer, exit_status
from jobs.spec import CHAIN, Job, make_chain, make_job, read_specs
from meteor.command_line import add_run, parse, run_command
from meteor.runs.identity import describe_left_out

_DESCRIPTION = """Submit a stage of a run to a Ray cluster, with the working directory's code. If the stage is running already,
its log is shown. After a failure, a new attempt continues where the last attempt stopped."""
_EPILOG = """Ray's own command for this is: ray job submit --working-dir . -- python -m pipelines.STAGE --run RUN.
Exit status: 0 if the job succeeded (without --wait: was submitted), 143 if it was stopped, otherwise
the status of the job; 2 after an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser("python -m jobs.submit", description=_DESCRIPTION, epilog=_EPILOG)
    names = [*read_specs(), "all"]
    parser.add_argument(
        "stage",
        choices=names,
        metavar="STAGE",
        help=f"stage to submit: {', '.join(names)}; `all` means {', '.join(CHAIN)}, one after the other",
    )
    add_run(parser)
    parser.add_argument(
        "--address",
        metavar="URL",
        help="address of the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, or this machine's dashboard)",
    )
    parser.add_argument("--wait", action="store_true", help="show the log until the job ends; `all` always does so")
    parser.add_argument("--dry-run", action="store_true", help="print the jobs instead of submitting them")
    # Ray's client logs uploads, every ignored file and each connection at INFO and WARNING.
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    arguments = parse(parser, argv)

    def act() -> int:
        if arguments.stage == "all":
            jobs = make_chain(arguments.run, arguments.overrides)
            for line in describe_left_out(jobs[-1].settings):
                print(line)
        else:
            jobs = [make_job(arguments.stage, arguments.run, arguments.overrides)]
        if arguments.dry_run:
            for job in jobs:
                print(f"{job.submission_id(1)}: {job.entrypoint}")
            return 0
        return submit(jobs, JobServer(arguments.address), wait=arguments.wait or arguments.stage == "all")

    return run_command(act)


def submit(jobs: Sequence[Job], server: JobServer, *, wait: bool, write: Callable[[str], object] | None = None) -> int:
    """Submit jobs one by one, each after the previous job has succeeded.

    Args:
        jobs: jobs in order.
        server: job server of the cluster.
        wait: whether to follow each job until it ends; without, all jobs are submitted at once.
        write: callback for output; standard output if None.

    Returns:
        The exit status of the last submitted job.
    """
    write = write or _write
    status = 0
    for number, job in enumerate(jobs, 1):
        submission_id, is_new = server.submit(job)
        place = f" ({number} of {len(jobs)})" if len(jobs) > 1 else ""
        write(
            f"[{job.settings.name}] {job.stage}{place}: {'submitted' if is_new else 'is running'} as {submission_id}\n"
        )
        tracking = job.tracking_page(submission_id) or "by the cluster's own MLFLOW_TRACKING_URI; the log names the run"
        write(f"  dashboard  {server.page(submission_id)}\n  MLflow     {tracking}\n")
        if not wait:
            write(f"  follow it: ray job logs --follow {submission_id}; stop it: ray job stop {submission_id}\n")
            continue
        try:
            details = server.follow(submission_id, write)
        except KeyboardInterrupt:
            write(f"\nThe job continues. Run the command again to follow it; ray job stop {submission_id} stops it.\n")
            return 130
        status = exit_status(details)
        write(
            f"{submission_id}: {details.status.value}{f', {details.message}' if status and details.message else ''}\n"
        )
        if status:
            left = ", ".join(job.stage for job in jobs[number:])
            write(f"Not started: {left}. Run the command again to continue here.\n" if left else "")
            return status
    return status


def _write(text: str) -> None:
    print(text, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
