"""infra/storage/iam-policy.json on a real server: enough for a run, and no more."""

import json
from pathlib import Path

import boto3
import pytest
from ceph import WORKER, WORKER_ACCESS_KEY, WORKER_SECRET_KEY

from meteor import storage
from meteor.cache import CacheIdentity, FeatureCache, commit, create_cache, encode_row, get_codec, write_feature_file
from meteor.cache.upkeep import plan_gc, run_gc
from meteor.errors import AlreadyExistsError, StorageError

pytestmark = pytest.mark.s3
POLICY = json.loads((Path(__file__).parents[2] / "infra/storage/iam-policy.json").read_text())
LIFECYCLE = json.loads((Path(__file__).parents[2] / "infra/storage/lifecycle.json").read_text())
BUCKET = "meteor"


@pytest.fixture
def as_worker(ceph_root, monkeypatch):
    """A bucket whose policy gives a user without any rights those of the file; this process is that user."""
    owner = boto3.session.Session().client("s3")
    owner.create_bucket(Bucket=BUCKET)
    # All but the last, which refuses plain HTTP.
    statements = [
        {**one, "Principal": {"AWS": [f"arn:aws:iam:::user/{WORKER}"]}}
        for one in POLICY["Statement"]
        if one["Effect"] == "Allow"
    ]
    owner.put_bucket_policy(Bucket=BUCKET, Policy=json.dumps({**POLICY, "Statement": statements}))
    for key in ("data/a.json", "models/clip/config.json", "mlflow/1/secret", "outputs/old"):
        owner.put_object(Bucket=BUCKET, Key=key, Body=b"{}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", WORKER_ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", WORKER_SECRET_KEY)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    return owner


def test_a_run_may_do_what_it_does(as_worker, make_features, make_model, tmp_path):
    assert storage.read_json(f"s3://{BUCKET}/data/a.json") == {}
    assert storage.exists(f"s3://{BUCKET}/models/clip/config.json")
    assert not storage.exists(f"s3://{BUCKET}/outputs/run/absent")
    output = f"s3://{BUCKET}/outputs/run"
    storage.create_bytes(f"{output}/one", b"1")
    with pytest.raises(AlreadyExistsError):
        storage.create_bytes(f"{output}/one", b"2")
    assert storage.now_s(output) > 0
    (tmp_path / "large").write_bytes(bytes(20 << 20))  # in parts
    storage.upload_file(str(tmp_path / "large"), f"{output}/large")
    assert storage.delete_leftovers(output, 0, dry_run=False) == []
    identity = CacheIdentity.from_dict(make_model().config.cache_identity)
    uri = create_cache(f"{output}/cache", identity, "float16")
    write_feature_file(uri, [encode_row(make_features("a" * 64), get_codec("float16"))], get_codec("float16"))
    commit(uri)
    assert FeatureCache.open(uri).verify() == []
    run_gc(plan_gc(uri, older_than_s=0))
    storage.delete(f"{output}/one")
    assert {info.uri.rpartition("/")[2] for info in storage.list_objects(f"{output}")} >= {"large"}


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda: storage.write_bytes(f"s3://{BUCKET}/data/a.json", b"changed"),
        lambda: storage.delete(f"s3://{BUCKET}/models/clip/config.json"),
        lambda: storage.read_bytes(f"s3://{BUCKET}/mlflow/1/secret"),
        lambda: storage.list_objects(f"s3://{BUCKET}/mlflow"),
    ],
    ids=["write data", "delete a model", "read artifacts", "list artifacts"],
)
def test_a_run_may_do_nothing_else(as_worker, forbidden):
    with pytest.raises(StorageError):
        forbidden()


def test_a_server_takes_the_lifecycle(as_worker):
    as_worker.put_bucket_lifecycle_configuration(Bucket=BUCKET, LifecycleConfiguration=LIFECYCLE)
    rules = as_worker.get_bucket_lifecycle_configuration(Bucket=BUCKET)["Rules"]
    assert {rule["ID"] for rule in rules} == {rule["ID"] for rule in LIFECYCLE["Rules"]}
