"""Pins: versions of index and cache that a stage reads from its first start to its last."""

from collections.abc import Mapping
from typing import Any

from meteor import storage
from meteor.cache import FeatureCache
from meteor.checksums import read_checked_json, write_checked_json
from meteor.config import RunSettings, settings_digest
from meteor.errors import NotFoundError
from meteor.runs.folder import StageFolder
from meteor.runs.identity import StageIdentity, Versions
from meteor.stages import TrainingStage


def choose_versions(
    settings: RunSettings, stage: TrainingStage, content: Mapping[str, Any], current: Versions
) -> Versions:
    """Choose the versions that a stage reads: those of its pin, or the current ones.

    An unfinished stage keeps its pin while index and cache grow. If the images of a finished stage have changed since, the
    current versions make another stage. Versions that the settings name come before any pin.

    Args:
        settings: settings of the run.
        stage: name of the stage.
        content: the stage's identity without its images.
        current: the newest versions, or the versions that the settings name.
    """
    if settings.cache.version is not None and settings.cache.index_version is not None:
        return current
    pinned = _read(_uri(settings, stage, content))
    if pinned is None or pinned.index_digest == current.index_digest:
        return pinned or current
    pinned_stage = StageIdentity(stage, {**content, "images": pinned.index_digest})
    return current if StageFolder(settings.output, pinned_stage).finished() else pinned


def hold_pin(settings: RunSettings, identity: StageIdentity, cache_uri: str) -> FeatureCache:
    """Pin a stage to its versions.

    The pin is written twice: into the output, for the next start of this stage, and into the cache, so that cleaning spares
    the version.

    Returns:
        The pinned version of the cache.
    """
    versions = identity.versions
    assert versions is not None
    content = {name: value for name, value in identity.content.items() if name != "images"}
    pin = {"run_digest": identity.digest, **vars(versions)}
    write_checked_json(_uri(settings, identity.stage, content), pin)
    cache = FeatureCache.open(cache_uri, version=versions.cache_version)
    cache.pin(identity.digest, {"name": settings.name, "stage": identity.stage, "output": settings.output})
    return cache


def _uri(settings: RunSettings, stage: str, content: Mapping[str, Any]) -> str:
    return storage.join(settings.output, "pins", f"{stage}-{settings_digest(content)[:16]}.json")


def _read(uri: str) -> Versions | None:
    try:
        content = read_checked_json(uri)
    except NotFoundError:
        return None
    return Versions(content["index_version"], content["index_digest"], content["cache_version"])
