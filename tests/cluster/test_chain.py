"""The whole chain on a cluster whose nodes and tracking server go away in the middle."""

import json
import re
import time
from pathlib import Path

import mlflow
import pytest
from ceph import SECRET_KEY
from cluster import BUCKET, Cluster, Scraper, wait_for
from services import PASSWORD

from meteor import storage
from meteor.cache import FeatureCache
from meteor.runs.reading import read_stage

OUTPUT = f"s3://{BUCKET}/outputs/demo"
# Small files, many steps and checkpoints: there is a middle to be killed in.
SETTINGS = (
    "cache.rows_per_file=2 runtime.cpus_per_worker=2 runtime.peak_tflops=1 "
    "pretrain.zero_stage=0 pretrain.epochs=4 pretrain.global_batch_size=8 pretrain.micro_batch_size=4 "
    "pretrain.checkpoint_every_steps=10 "
    "finetune.zero_stage=0 finetune.epochs=2 finetune.global_batch_size=16 finetune.micro_batch_size=8 "
    "finetune.checkpoint_every_steps=10"
)
NUM_IMAGES = 184
# Made by conftest.py.
BROKEN = "broken.png"
STAGES = ("cache_features", "pretrain", "finetune", "evaluate", "report")


def files(part: str) -> list[str]:
    return [info.uri for info in storage.list_objects(OUTPUT) if part in info.uri]


def stage_folder(stage: str) -> str | None:
    found = {uri.partition(f"/runs/{stage}-")[2].partition("/")[0] for uri in files(f"/runs/{stage}-")}
    assert len(found) <= 1, f"several runs of {stage}: {found}"
    return f"{OUTPUT}/runs/{stage}-{found.pop()}" if found else None


def steps_done(stage: str) -> int:
    folder = stage_folder(stage)
    rows = read_stage(folder).metrics if folder and files(f"{folder}/metrics/") else []
    return max((row["step"] for row in rows), default=0)


def num_steps(stage: str) -> int:
    return storage.read_json(f"{stage_folder(stage)}/summary.json")["counts"]["steps"]


@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_the_chain_survives_the_loss_of_nodes_and_of_mlflow(running_cluster: Cluster):
    one = running_cluster
    ready = one.run("python -m jobs.submit preflight --run demo_cluster --wait", log="preflight.log")
    assert "demo_cluster: 3 nodes are ready" in ready, ready
    with Scraper(one) as scraper:
        run_chain(one)
    dashboard = (Path(__file__).parents[2] / "infra/observability/dashboard.json").read_text()
    assert scraper.names == set(re.findall(r"ray_meteor_\w+", dashboard))
    check_results()
    check_mlflow(one)
    check_logs(one)
    check_secrets(one)


def run_chain(one: Cluster) -> None:
    """Submit it, take things away in the middle, and start it again when it has ended."""
    chain = one.submit(f"python -m jobs.submit all --run demo_cluster {SETTINGS}", log="chain.log")
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    def come(what: str, condition) -> None:
        def either() -> bool:
            assert chain.poll() is None, (one.logs / "chain.log").read_text()[-6000:]
            return bool(condition())

        wait_for(what, either, timeout_s=400)

    come("encoded images", lambda: len(files("/ledger/")) >= 10)
    one.kill_worker("one")
    num_files = len(files("/ledger/"))
    assert num_files < NUM_IMAGES / 2, "all was encoded before the node was killed"
    say(f"node one killed when {num_files} of {NUM_IMAGES // 2} feature files were written")
    one.add_worker("three")

    come("pretrain", lambda: steps_done("pretrain") >= 5)
    one.tracking.stop()
    stopped_at = time.monotonic()
    say(f"MLflow stopped at step {steps_done('pretrain')} of pretrain")

    come("a checkpoint of pretrain", lambda: steps_done("pretrain") >= 25)
    done = steps_done("pretrain")
    one.kill_worker("two")
    say(f"node two killed at step {done} of pretrain")
    one.add_worker("four")
    come("the end of MLflow's outage", lambda: time.monotonic() > stopped_at + 60)
    one.tracking.start()
    say(f"MLflow started again after {time.monotonic() - stopped_at:.0f} s")

    status = chain.wait(timeout=900)
    text = (one.logs / "chain.log").read_text()
    assert status == 0, text[-6000:]
    say("the chain has ended well")

    # The same by Ray's own command, as one job: everything is found; MLflow is sent what it still lacks.
    again = one.run(
        f"ray job submit --working-dir . -- python -m pipelines.all --run demo_cluster {SETTINGS}", log="again.log"
    )
    assert again.count("finished before, nothing to do") == 4
    say("started again, everything is found")


def check_results() -> None:
    """Complete, once."""
    [manifest_folder] = {uri.partition("/ledger/")[0] for uri in files("/ledger/")}
    cache = FeatureCache.open(manifest_folder)
    assert len(cache) == NUM_IMAGES
    assert [row.name for row in cache.quarantine()] == [BROKEN]
    assert cache.verify() == []
    assert len(set(cache.keys())) == NUM_IMAGES
    for stage in ("pretrain", "finetune"):
        steps = [row["step"] for row in read_stage(stage_folder(stage)).metrics]
        assert steps == list(range(1, num_steps(stage) + 1)), f"{stage}: {steps}"
    scores = storage.read_json(f"{stage_folder('evaluate')}/scores.json")
    assert scores["scenes"]["num_questions"] > 0
    assert files("/report/")


def check_mlflow(one: Cluster) -> None:
    """One run for each stage, ended, with every step, and a tag that leads to the job."""
    client = mlflow.MlflowClient(one.tracking.uri)
    experiment = client.get_experiment_by_name("llava-meteor")
    runs = client.search_runs([experiment.experiment_id], "tags.`meteor.kind` = 'stage'")
    by_stage = {run.data.tags["meteor.stage"]: run for run in runs}
    assert sorted(by_stage) == sorted(STAGES[:-1])
    assert len(runs) == len(by_stage)
    for stage, run in by_stage.items():
        assert run.info.status == "FINISHED", stage
        assert re.fullmatch(rf"{stage}-[0-9a-f]{{12}}-\d+", run.data.tags["ray.submission_id"])
        assert run.data.tags["ray.dashboard"].endswith(run.data.tags["ray.submission_id"])
    for stage in ("pretrain", "finetune"):
        history = client.get_metric_history(by_stage[stage].info.run_id, "loss")
        assert {point.step for point in history} == set(range(1, num_steps(stage) + 1))


def check_logs(one: Cluster) -> None:
    """Our lines are JSON that says what they are about."""
    lines = (one.logs / "chain.log").read_text().splitlines()
    ours = [json.loads(line) for line in lines if line.startswith("{")]
    steps = [line for line in ours if re.search(r"pretrain: step [1-9]", line["message"])]
    assert steps
    assert all(line["stage"] == "pretrain" and line["run"] == "demo_cluster" for line in steps)
    assert {line["digest"] for line in steps} == {stage_folder("pretrain").rpartition("-")[2]}


def check_secrets(one: Cluster) -> None:
    """Nothing that a full run leaves behind holds a credential."""
    secrets = [SECRET_KEY, PASSWORD, one.environment["RAY_AUTH_TOKEN"]]
    left = {info.uri: storage.read_bytes(info.uri) for info in storage.list_objects(f"s3://{BUCKET}")}
    left |= {str(path): path.read_bytes() for path in one.logs.iterdir() if path.name != "mlflow.log"}
    header = f"Authorization: Bearer {one.environment['RAY_AUTH_TOKEN']}"
    jobs = one.on_head("curl", "--silent", "--show-error", "--fail", "-H", header, "http://127.0.0.1:8265/api/jobs/")
    assert len(json.loads(jobs)) >= len(STAGES)
    left["the jobs"] = jobs.encode()
    client = mlflow.MlflowClient(one.tracking.uri)
    for run in client.search_runs([experiment.experiment_id for experiment in client.search_experiments()]):
        left[f"MLflow's {run.info.run_name}"] = repr(run.to_dictionary()).encode()
    for place, data in left.items():
        for secret in secrets:
            assert secret.encode() not in data, f"{place} holds a credential"
