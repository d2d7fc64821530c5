"""Secrets are refused in run files, and covered in messages, log lines, MLflow, job metadata and reports."""

import logging

import pytest
from pydantic import ValidationError

from meteor.command_line import print_error
from meteor.config import RunSettings
from meteor.secrets import redact
from pipelines.ray_parts.logs import JsonFormatter, TextFormatter

SECRETS = [
    "http://user:hunter2@host/x",
    "http://user:hun/ter2@host:5000/x",
    "https://hunter2@host",
    "postgresql://u:hunter2@h:5432/db",
    "https://host/x?password=hunter2",
    "https://host/x?a=1&api_key=hunter2&b=2",
    "https://b.s3.amazonaws.com/k?X-Amz-Credential=hunter2&X-Amz-Date=1",
    "https://b.s3.amazonaws.com/k?X-Amz-Date=1&X-Amz-Signature=hunter2",
    "https://a.blob.core.windows.net/k?sv=2&sig=hunter2%3D",
    "https://host/x?mlflow_token=1&access_token=hunter2",
    "Authorization: Bearer hunter2.abcdefghijklm",
]
KEYS = ["AKIA" + "ABCDEFGH12345678", "hf_" + "a1" * 17, "ghp_" + "b2" * 18]
PLAIN = [
    "s3://bucket/images/a@2x.png",
    "http://host:8080/a@b",
    "http://host:8080?mail=a@b",
    "s3://bucket/key with spaces/é.jpg",
    "https://host/search?q=password&max_tokens=5",
    "the password is asked for; mail me@example.org",
    "sqlite:////data/mlflow.db",
    "USER: what is it? ASSISTANT: Basic understanding of tokens",
    "a bearer of good news",
    "pad_token=[PAD]",
    "hf_hub/models--lmsys--vicuna-7b-v1.5",
]


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_in_addresses_are_covered_and_the_rest_stays(text):
    covered = redact(f"cannot reach {text} (timeout)")
    assert "hunter2" not in covered
    assert covered.startswith("cannot reach ")
    assert covered.endswith("(timeout)")
    assert redact(covered) == covered


@pytest.mark.parametrize("key", KEYS)
def test_keys_of_services_are_covered(key):
    assert redact(f"key {key}, next") == "key ***, next"


@pytest.mark.parametrize("text", PLAIN)
def test_other_texts_stay_as_they_are(text):
    assert redact(text) == text


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        *(({"tracking": {"uri": text}}, "tracking.uri") for text in SECRETS[:-1]),
        *(({"llm": {"path": key}}, "llm.path") for key in KEYS),
        ({"data": {"pretrain": {SECRETS[0]: 1}}}, "data.pretrain"),
        ({"data": {"roots": {"": SECRETS[1]}}}, "data.roots."),
        ({"finetune": {"deepspeed": {"comms": {"api_key": "hunter2"}}}}, "finetune.deepspeed.comms.api_key"),
        ({"finetune": {"deepspeed": {"hooks": [{"hf_token": "hunter2"}]}}}, r"finetune.deepspeed.hooks\[0\].hf_token"),
        ({"projector": {"settings": {"password": "hunter2"}}}, "projector.settings.password"),
    ],
)
def test_a_run_with_a_secret_in_any_place_is_refused_without_showing_it(settings, name):
    with pytest.raises(ValidationError, match=f"{name}.*does not belong in a run") as caught:
        RunSettings.model_validate(settings)
    messages = [error["msg"] for error in caught.value.errors()]
    assert all("hunter2" not in message and message.count("AKIA") == 0 for message in messages)


def test_ordinary_runs_are_no_secrets():
    RunSettings.model_validate({"data": {"roots": {"": PLAIN[0]}}, "tracking": {"uri": "http://host:5000"}})
    RunSettings.model_validate({"finetune": {"deepspeed": {"tokenizer": {"pad_token": "[PAD]"}}}})


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter("%(message)s")])
def test_log_lines_and_their_tracebacks_are_covered(formatter):
    try:
        raise ConnectionError(f"no answer from {SECRETS[0]}")
    except ConnectionError as error:
        record = logging.LogRecord(
            "meteor", logging.ERROR, "", 0, "lost %s", (SECRETS[1],), (type(error), error, error.__traceback__)
        )
    line = formatter.format(record)
    assert "lost" in line
    assert "no answer from" in line
    assert "hunter2" not in line


def test_an_error_of_a_command_is_covered(capsys):
    print_error("StorageError", f"{SECRETS[6]} cannot be read")
    assert capsys.readouterr().err == (
        "StorageError: https://b.s3.amazonaws.com/k?X-Amz-Credential=***&X-Amz-Date=1 cannot be read\n"
    )
