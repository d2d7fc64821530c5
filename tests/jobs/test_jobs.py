"""What is submitted, as what, and what happens to it: without a cluster. tests/cluster has one."""

import http.server
import os
import threading

import pytest
import yaml
from ray.job_submission import JobStatus

from jobs.client import JobServer, exit_status
from jobs.spec import CHAIN, make_chain, make_job
from jobs.submit import main, submit
from meteor.errors import ClusterError, SettingsError


@pytest.fixture
def said() -> list[str]:
    return []


def test_a_job_is_a_command_in_the_working_directory(fake):
    job = make_job("pretrain", "demo", ["pretrain.lr=1e-3", "name=two_words"])
    submission_id, is_new = JobServer().submit(job)
    [submitted] = fake.submitted
    assert is_new
    assert submission_id == f"pretrain-{job.digest}-1"
    assert submitted["entrypoint"] == "python -m pipelines.pretrain --run demo pretrain.lr=1e-3 name=two_words"
    assert submitted["runtime_env"]["working_dir"] == "."
    assert submitted["metadata"]["job_page"].endswith(f"/#/jobs/{submission_id}")


def test_overrides_are_quoted_for_the_shell():
    job = make_job("pretrain", "demo", ["projector.settings={k: 4}"])
    assert job.entrypoint.endswith("'projector.settings={k: 4}'")


def test_the_digest_is_of_what_is_computed_and_where_it_is_left():
    plain = make_job("pretrain", "demo").digest
    assert make_job("pretrain", "demo", ["runtime.num_workers=8", "pretrain.micro_batch_size=1"]).digest == plain
    for change in ("pretrain.lr=1", "output=elsewhere", "data.pretrain=other.json", "llm.path=other"):
        assert make_job("pretrain", "demo", [change]).digest != plain
    # Under another name it is the same stage, and the same folder; a report has a folder of its own.
    assert make_job("pretrain", "demo", ["name=other"]).digest == plain
    assert make_job("report", "demo", ["name=other"]).digest != make_job("report", "demo").digest


def test_a_running_job_is_joined(fake):
    job = make_job("pretrain", "demo")
    first, _ = JobServer().submit(job)
    assert JobServer().submit(make_job("pretrain", "demo", ["runtime.num_workers=8"])) == (first, False)
    assert len(fake.submitted) == 1


@pytest.mark.parametrize("status", [JobStatus.FAILED, JobStatus.STOPPED, JobStatus.SUCCEEDED])
def test_after_the_end_a_new_attempt_has_the_next_number(fake, status):
    # Ray takes no id twice. What has succeeded may have new data: the stage itself knows whether there is anything to do.
    job = make_job("pretrain", "demo")
    for attempt in (1, 2, 10):
        fake.add(job.submission_id(attempt), status)
    fake.add("pretrain-000000000000-99", JobStatus.RUNNING)
    assert JobServer().submit(job) == (job.submission_id(11), True)


def test_of_two_who_submit_at_once_one_joins_the_other(fake):
    job = make_job("pretrain", "demo")

    def faster(submission_id):
        fake.before_submitting = lambda submission_id: None
        fake.add(submission_id, JobStatus.RUNNING)

    fake.before_submitting = faster
    assert JobServer().submit(job) == (job.submission_id(1), False)


def test_the_log_is_passed_on_once_over_broken_connections(fake, said):
    server = JobServer()
    submission_id, _ = server.submit(make_job("pretrain", "demo"))
    fake.cuts = 2
    assert server.follow(submission_id, said.append).status == JobStatus.SUCCEEDED
    assert "".join(said) == fake.log


def test_a_cluster_that_is_away_for_a_moment_is_waited_for(fake, said):
    server = JobServer()
    submission_id, _ = server.submit(make_job("pretrain", "demo"))
    fake.cuts, fake.absences = 1, 3
    assert server.follow(submission_id, said.append).status == JobStatus.SUCCEEDED
    told = [text for text in said if "does not answer" in text]
    assert len(told) == 1
    assert "".join(text for text in said if text not in told) == fake.log


def test_a_cluster_that_does_not_come_back_is_given_up(fake, said, monkeypatch):
    monkeypatch.setattr("jobs.client._PATIENCE_S", 0.0)
    server = JobServer()
    submission_id, _ = server.submit(make_job("pretrain", "demo"))
    fake.absences = 100
    with pytest.raises(ClusterError, match=submission_id):
        server.follow(submission_id, said.append)


def test_a_job_that_a_new_head_does_not_know_is_not_waited_for(fake, said, monkeypatch):
    def forgotten(submission_id):
        raise RuntimeError(f"Request failed with status code 404: Job {submission_id} does not exist.")

    server = JobServer()
    submission_id, _ = server.submit(make_job("pretrain", "demo"))
    monkeypatch.setattr(fake, "get_job_info", forgotten)
    with pytest.raises(ClusterError, match="its head has restarted"):
        server.follow(submission_id, said.append)


def test_a_chain_goes_through_the_stages_of_all_runs_that_are_compared():
    chain = make_chain("demo", ["pretrain.lr=1"])
    assert [(job.settings.name, job.stage) for job in chain] == [
        *(("meteor", stage) for stage in CHAIN[:-1]),
        *(("mlp", stage) for stage in CHAIN[:-1]),
        ("meteor", "report"),
    ]
    assert chain[1].settings.pretrain.lr == 1
    assert chain[5].settings.pretrain.lr != 1


def test_a_chain_leaves_out_what_the_run_does_not_ask_for():
    stages = [
        job.stage for job in make_chain("demo_cluster", ["finetune.pretrained=s3://meteor/p", "data.evaluate={}"])
    ]
    assert stages == ["cache_features", "finetune", "report"]


def test_a_chain_stops_at_the_first_failure_and_goes_on_there(fake, said):
    chain = make_chain("demo_cluster")
    fake.ends["finetune"] = JobStatus.FAILED
    assert submit(chain, JobServer(), wait=True, write=said.append) == 1
    assert [one["submission_id"].partition("-")[0] for one in fake.submitted] == [
        "cache_features",
        "pretrain",
        "finetune",
    ]
    assert "Not started: evaluate, report" in "".join(said)
    fake.ends.clear()
    assert submit(chain, JobServer(), wait=True, write=said.append) == 0
    # The stages that have finished say so themselves.
    assert [one["submission_id"] for one in fake.submitted[3:]] == [
        f"{job.stage}-{job.digest}-{1 if job.stage in ('evaluate', 'report') else 2}" for job in chain
    ]


def test_ctrl_c_leaves_the_job_alone(fake, said, monkeypatch):
    def interrupt(submission_id, write):
        raise KeyboardInterrupt

    server = JobServer()
    monkeypatch.setattr(server, "follow", interrupt)
    assert submit([make_job("pretrain", "demo")], server, wait=True, write=said.append) == 130
    assert "The job continues" in said[-1]


def test_exit_statuses(fake):
    job = make_job("pretrain", "demo")
    for status, code, expected in [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 3, 3),
        (JobStatus.FAILED, None, 1),
        (JobStatus.STOPPED, None, 143),
    ]:
        fake.add(job.submission_id(1), status)
        details = fake.get_job_info(job.submission_id(1))
        details.driver_exit_code = code
        assert exit_status(details) == expected


def test_a_run_file_that_does_not_travel_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"name": "one"}))
    with pytest.raises(SettingsError, match="lies outside the working directory"):
        make_job("pretrain", str(tmp_path / "run.yaml"))


def test_credentials_do_not_go_into_a_job(fake, capsys):
    assert main(["pretrain", "--run", "demo", "tracking.uri=http://me:secret@host:5000"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("SettingsError: demo: tracking.uri: a password, token or key does not belong in a run")
    assert "secret" not in shown
    assert not fake.submitted


def test_without_waiting_links_are_printed(fake, capsys):
    assert main(["pretrain", "--run", "demo"]) == 0
    shown = capsys.readouterr().out
    assert "http://127.0.0.1:8265/#/jobs/pretrain-" in shown
    assert "ray job logs --follow pretrain-" in shown


@pytest.mark.parametrize(
    ("status", "text"), [(401, "Missing authentication token"), (403, "Invalid token"), (500, "oops")]
)
def test_a_server_that_lets_nobody_in_is_said(capsys, monkeypatch, status, text):
    class Guard(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments):
            pass

    for name in [name for name in os.environ if name.startswith("RAY_A")]:
        monkeypatch.delenv(name)
    with http.server.HTTPServer(("127.0.0.1", 0), Guard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert main(["cache_features", "--run", "demo", "--address", address]) == 2
        server.shutdown()
    shown = capsys.readouterr().err
    assert f"ClusterError: no Ray cluster answers at {address}, or it asks for a token" in shown
    assert "RAY_AUTH_TOKEN" in shown


def test_a_cluster_that_is_not_there_is_said(capsys, monkeypatch):
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert main(["pretrain", "--run", "demo", "--address", "http://127.0.0.1:1"]) == 2
    assert "no Ray cluster answers at http://127.0.0.1:1" in capsys.readouterr().err
