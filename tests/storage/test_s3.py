"""S3 objects (a mock on loopback): what is refused, how it is said, where the settings come from."""

import os
import socket
import threading
from pathlib import Path

import pytest
from proxy import Fault, fault_proxy

from meteor import storage
from meteor.errors import NotFoundError, StorageError
from meteor.storage import s3
from meteor.storage.client import s3_client
from meteor.storage.s3_errors import s3_errors


def test_empty_folder_markers_are_not_listed(s3_root: str) -> None:
    storage.write_bytes(storage.join(s3_root, "data/file"), b"x")
    bucket, _, key = s3_root.removeprefix("s3://").partition("/")
    s3_client().put_object(Bucket=bucket, Key=f"{key}/data/empty/", Body=b"")
    assert [info.uri for info in storage.list_objects(s3_root)] == [storage.join(s3_root, "data/file")]


def test_a_missing_bucket_is_named_rather_than_taken_for_empty(s3_root: str) -> None:
    with pytest.raises(NotFoundError, match="no-such-bucket"):
        storage.list_objects("s3://no-such-bucket/cache")
    with pytest.raises(NotFoundError, match="no-such-bucket"):
        storage.write_bytes("s3://no-such-bucket/cache/file", b"x")


@pytest.mark.parametrize("uri", ["s3://", "s3:///key", "s3://bucket", "s3://bucket/", "gs://bucket/key"])
def test_uris_that_name_no_object_are_refused(s3_root: str, uri: str) -> None:
    with pytest.raises(StorageError, match="s3://"):
        storage.read_bytes(uri)


def test_an_unreachable_store_is_a_storage_error_with_the_uri(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StorageError, match="s3://bucket/file"):
        storage.read_bytes("s3://bucket/file")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("AccessDenied", "s3:ListBucket"),
        ("403", "s3:ListBucket"),
        ("InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", "another endpoint"),
        ("ExpiredToken", "expired"),
        ("RequestTimeTooSkewed", "clock"),
        ("PermanentRedirect", "another region than us-east-1, in eu-central-1; set AWS_REGION"),
        ("AuthorizationHeaderMalformed", "AWS_REGION"),
        ("SlowDown", r"overloaded or down \(8 attempts\)"),
        ("503", "overloaded"),
        ("QuotaExceeded", "full"),
        ("SomethingNew", "SomethingNew"),
    ],
)
def test_refusals_say_what_they_mean_and_what_to_do(s3_root: str, code: str, said: str) -> None:
    from botocore.exceptions import ClientError

    headers = {"x-amz-bucket-region": "eu-central-1"}
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"RetryAttempts": 7, "HTTPHeaders": headers}}
    with pytest.raises(StorageError, match=f"^s3://bucket/file: .*{said}"), s3_errors("s3://bucket/file"):
        raise ClientError(answer, "PutObject")


@pytest.mark.parametrize("sent", [b"", b"<?xml version='1.0'?><ListBucketResult><Name>bucket</Name><Cont"])
def test_a_listing_that_breaks_off_is_not_taken_for_a_short_one(
    s3_root: str, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    num_requests = 0
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            nonlocal num_requests
            for _ in range(2):
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 700\r\n\r\n" + sent)
                num_requests += 1

        thread = threading.Thread(target=answer)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
        with pytest.raises(StorageError, match=f"^{s3_root}: "):
            storage.list_objects(s3_root)
        thread.join()
    assert num_requests == 2


def test_an_upload_whose_last_answer_is_lost_is_sent_again(
    s3_endpoint: str, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_MULTIPART_BYTES", 1 << 20)
    monkeypatch.setattr(s3, "_PART_BYTES", 5 << 20)
    uri, data = storage.join(s3_root, "large"), os.urandom(6 << 20)
    ends: list[str] = []

    def lose_first_end(method: str, path: str) -> Fault | None:
        if method == "POST" and "uploadId" in path:
            ends.append(path)
            return {1: Fault("lose_answer"), 2: Fault("forget_upload")}.get(len(ends))
        return None

    with fault_proxy(s3_endpoint, lose_first_end) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        storage.write_bytes(uri, data)
        # The second end is boto3's own, the third is of another upload.
        assert len(ends) == 3
        assert ends[0] == ends[1] != ends[2]
        assert storage.read_bytes(uri) == data


def test_missing_credentials_say_where_they_were_looked_for(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match=r"s3://bucket/file: no credentials.*AWS_ACCESS_KEY_ID.*AWS_PROFILE.*role"):
        storage.read_bytes("s3://bucket/file")


def test_an_unknown_profile_is_named(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "laboratory")
    with pytest.raises(StorageError, match=r"s3://bucket/file: .*laboratory.*AWS_PROFILE"):
        storage.write_bytes("s3://bucket/file", b"x")


def test_a_profile_gives_keys_token_region_and_endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("[profile lab]\nregion = eu-north-1\nendpoint_url = https://s3.lab.example:9000\n")
    (tmp_path / "credentials").write_text(
        "[lab]\naws_access_key_id = one\naws_secret_access_key = two\naws_session_token = three\n"
    )
    set_aws(
        monkeypatch,
        AWS_PROFILE="lab",
        AWS_CONFIG_FILE=str(tmp_path / "config"),
        AWS_SHARED_CREDENTIALS_FILE=str(tmp_path / "credentials"),
    )
    url = presigned()
    # Path style: nobody has made names for the buckets of a store of one's own.
    assert url.startswith("https://s3.lab.example:9000/bucket/a/key?")
    assert "Credential=one%2F" in url
    assert "%2Feu-north-1%2F" in url
    assert "Security-Token=three" in url


def test_variables_give_keys_token_region_and_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "one", "AWS_SECRET_ACCESS_KEY": "two", "AWS_SESSION_TOKEN": "three"}
    set_aws(monkeypatch, **keys, AWS_REGION="eu-west-3", AWS_CONFIG_FILE="/dev/null")
    url = presigned()
    assert url.startswith("https://bucket.s3.")
    assert "%2Feu-west-3%2F" in url
    assert "Credential=one%2F" in url
    assert "Security-Token=three" in url
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    assert presigned().startswith("http://minio:9000/bucket/a/key?")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:7480")
    assert presigned().startswith("http://127.0.0.1:7480/bucket/a/key?")


def test_virtual_hosts_are_used_where_the_profile_wants_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("[default]\ns3 =\n  addressing_style = virtual\n")
    keys = {"AWS_ACCESS_KEY_ID": "one", "AWS_SECRET_ACCESS_KEY": "two", "AWS_REGION": "us-east-1"}
    set_aws(monkeypatch, **keys, AWS_ENDPOINT_URL="http://minio:9000", AWS_CONFIG_FILE=str(tmp_path / "config"))
    assert presigned().startswith("http://bucket.minio:9000/a/key?")


def set_aws(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def presigned() -> str:
    return s3_client().generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "a/key"})
