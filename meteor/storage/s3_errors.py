"""Errors of an S3 store and of the network, as messages that name the object and a remedy."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from meteor.errors import AlreadyExistsError, NotFoundError, StorageError
from meteor.storage.client import boto3_module, num_attempts, s3_client

EXISTS = {"PreconditionFailed", "412"}
MISSING = {"NoSuchKey", "NotFound", "404"}
_LOOKED_FOR = (
    "looked at AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (with AWS_SESSION_TOKEN), at the profile that AWS_PROFILE "
    "names in ~/.aws, and at the role of this machine: set one of them"
)
_DENIED = (
    "the store refuses these credentials here. Give their user s3:GetObject, s3:PutObject, s3:DeleteObject, s3:ListBucket "
    "and s3:AbortMultipartUpload on it, or use others (without s3:ListBucket an absent object is refused too)"
)
_WRONG_KEY = "the store does not know these credentials, or they belong to another endpoint; " + _LOOKED_FOR
_EXPIRED = "the credentials have expired; renew them (aws sso login, or a new AWS_SESSION_TOKEN) and start again"
_SKEWED = "this machine's clock differs too much from the store's; set it"
_REGION = "the bucket lies in another region than {region}{right}; set AWS_REGION"
_BUSY = "the store is overloaded or down ({num} attempts); finished work is kept, so start again when the store answers"
_FULL = "the store is full, or a quota is reached; delete files that are not needed (meteor cache gc)"
# Error code -> meaning and remedy. The answer to HEAD has no body, so its code is the HTTP status alone.
_MEANING = {
    **dict.fromkeys(["AccessDenied", "403", "Forbidden", "AllAccessDisabled"], _DENIED),
    **dict.fromkeys(["InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidClientTokenId"], _WRONG_KEY),
    **dict.fromkeys(["ExpiredToken", "InvalidToken", "TokenRefreshRequired", "RequestExpired"], _EXPIRED),
    "RequestTimeTooSkewed": _SKEWED,
    **dict.fromkeys(
        ["PermanentRedirect", "AuthorizationHeaderMalformed", "301", "IllegalLocationConstraintException"], _REGION
    ),
    **dict.fromkeys(["SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "Throttling"], _BUSY),
    **dict.fromkeys(["500", "502", "503", "504", "BadGateway", "GatewayTimeout"], _BUSY),
    **dict.fromkeys(["QuotaExceeded", "507", "InsufficientCapacity"], _FULL),
}


@contextmanager
def s3_errors(uri: str) -> Iterator[None]:
    """Raise boto3's errors as this library's, with the URI and a remedy."""
    errors = boto3_module("botocore.exceptions")
    try:
        yield
    except errors.ClientError as error:
        raise _refusal(uri, error) from error
    except (errors.BotoCoreError, boto3_module("boto3.exceptions").Boto3Error) as error:
        raise StorageError(f"{uri}: {_failure(error, errors)}") from error


def code_of(client_error: Any) -> str:
    """Return the store's code for a refusal, or the HTTP status if the store sent no code."""
    return str(client_error.response.get("Error", {}).get("Code", ""))


def _refusal(uri: str, error: Any) -> StorageError:
    code = code_of(error)
    if code == "NoSuchBucket":
        bucket = uri.removeprefix("s3://").partition("/")[0]
        where = s3_client().meta.endpoint_url
        return NotFoundError(
            f"{uri} does not exist: there is no bucket {bucket!r} at {where}; create the bucket or correct its name"
        )
    if code in MISSING:
        return NotFoundError(f"{uri} does not exist ({code})")
    if code in EXISTS and error.operation_name == "GetObject":
        # The read had If-Match (`S3Object._fill`).
        return StorageError(f"{uri} was replaced while it was read; read it again")
    if code in EXISTS:
        return AlreadyExistsError(f"{uri} exists already")
    if code not in _MEANING:
        return StorageError(f"{uri}: {error}")
    answer = error.response.get("ResponseMetadata", {})
    right = answer.get("HTTPHeaders", {}).get("x-amz-bucket-region", "")
    meaning = _MEANING[code].format(
        region=s3_client().meta.region_name, right=right and f", in {right}", num=answer.get("RetryAttempts", 0) + 1
    )
    return StorageError(f"{uri}: {meaning}. The store said: {error}")


def _failure(error: Any, errors: Any) -> str:
    if isinstance(error, (errors.NoCredentialsError, errors.PartialCredentialsError, errors.CredentialRetrievalError)):
        return f"no credentials for S3 ({error}); {_LOOKED_FOR}"
    if isinstance(error, errors.ProfileNotFound):
        return f"{error}; correct AWS_PROFILE, or add the profile to ~/.aws/config"
    if isinstance(error, (errors.ConnectionError, errors.HTTPClientError)):
        client = s3_client()
        return (
            f"no answer from {client.meta.endpoint_url} in {num_attempts(client)} attempts ({error}). Check "
            "AWS_ENDPOINT_URL, AWS_REGION and the network; finished work is kept, so start again when the store answers"
        )
    return str(error)
