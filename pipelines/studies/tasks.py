"""A study's tasks: every stage of every variant, those that are the same once; and what all of them read."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from meteor import storage
from meteor.assembly import cache_uri, cache_version, identity_of, open_index
from meteor.cache import DatasetIndex, FeatureCache
from meteor.config import RunSettings, Variant, mathematical_settings, settings_digest
from meteor.errors import CacheError, NotFoundError
from pipelines import cache_features, evaluate, finetune, pretrain
from pipelines.inputs import load_mixture, load_sets, names_of_images
from pipelines.preparation import content_of
from pipelines.stage import canonical

_LOG = logging.getLogger(__name__)
STAGES = {"pretrain": pretrain, "finetune": finetune, "evaluate": evaluate}


@dataclass(frozen=True)
class Task:
    """One stage, for all variants that agree on it.

    Attributes:
        key: of what decides about its numbers: tasks with the same key are the same.
        stage: pretrain, finetune or evaluate.
        settings: of the first variant; as a stage of the study itself where several share it.
        used_by: names of the runs that need it.
        needs: keys of the tasks before it.
    """

    key: str
    stage: str
    settings: RunSettings
    used_by: tuple[str, ...]
    needs: tuple[str, ...]

    @property
    def label(self) -> str:
        if len(self.used_by) == 1:
            return f"{self.used_by[0]}, {self.stage}"
        return f"{self.stage} of {self.used_by[0]} and {len(self.used_by) - 1} more"


def plan_tasks(variants: Sequence[Variant]) -> dict[str, Task]:
    """Key -> task, in the order of the variants, each variant's own chain in a row."""
    chains = {variant.settings.name: _chain(variant.settings) for variant in variants}
    users: dict[str, list[str]] = {}
    for name, chain in chains.items():
        for key in chain.values():
            users.setdefault(key, []).append(name)
    tasks: dict[str, Task] = {}
    for variant in variants:
        chain = chains[variant.settings.name]
        before: tuple[str, ...] = ()
        for stage, key in chain.items():
            used_by = tuple(users[key])
            tasks.setdefault(key, Task(key, stage, _shared(variant.settings, key, used_by), used_by, before))
            before = (key,)
    return tasks


def _shared(settings: RunSettings, key: str, used_by: tuple[str, ...]) -> RunSettings:
    """A name of its own for what belongs to no single variant."""
    if len(used_by) == 1:
        return settings
    tracking = settings.tracking.model_copy(update={"used_by": used_by})
    return settings.model_copy(update={"tracking": tracking, "name": f"shared-{key[-6:]}"})


def _chain(settings: RunSettings) -> dict[str, str]:
    """Stage -> key, of the stages that the run's settings ask for."""
    identity, chain = identity_of(settings), {}
    parent = settings.finetune.pretrained
    if settings.data.sources("pretrain") and not parent:
        content = content_of(settings, "pretrain", load_mixture(settings, "pretrain"), identity, None)
        chain["pretrain"] = parent = settings_digest(content)
    if settings.data.sources("finetune"):
        content = content_of(settings, "finetune", load_mixture(settings, "finetune"), identity, parent)
        chain["finetune"] = settings_digest(content)
    model = settings.evaluate.model or chain.get("finetune")
    if settings.data.evaluate and model:
        sets = {one.name: evaluate.scoring_digest(one) for one in evaluate.load_question_sets(settings)}
        asked = mathematical_settings(settings.evaluate)
        content = {"model": model, "evaluate": asked, "dtype": settings.llm.dtype, "sets": sets}
        chain["evaluate"] = settings_digest(canonical(content))
    return {stage: f"{stage}-{digest[:16]}" for stage, digest in chain.items()}


@dataclass(frozen=True)
class Pins:
    """The versions that all variants read, whatever is added meanwhile.

    Attributes:
        index_version: of the dataset index.
        caches: URI -> version.
    """

    index_version: int
    caches: dict[str, int]

    def of(self, settings: RunSettings) -> RunSettings:
        """The settings of a run that reads them."""
        uri = cache_uri(settings, identity_of(settings))
        cache = settings.cache.model_copy(update={"index_version": self.index_version, "version": self.caches.get(uri)})
        return settings.model_copy(update={"cache": cache})


def study_uri(settings: RunSettings, *parts: str) -> str:
    """The study's folder, and what is in it."""
    return storage.join(settings.output, "studies", settings.name, *parts)


def read_pins(settings: RunSettings) -> Pins | None:
    """None before the study's first start."""
    try:
        return Pins(**storage.read_json(study_uri(settings, "pins.json")))
    except NotFoundError:
        return None


def hold_pins(settings: RunSettings, variants: Sequence[Variant]) -> Pins:
    """The study's pins, made at its first start; taken anew where they lack an image of a variant that has come since.

    Taken anew, an image that has changed makes other runs of the variants that show it: numbers are never compared that
    come from different images.

    Raises:
        CacheError: cache_features has not run for all of them.
    """
    uris = {cache_uri(one.settings, identity_of(one.settings)): one.settings for one in variants}
    pins = read_pins(settings)
    if pins is None or not _holds_all(settings, pins, uris):
        if pins is not None:
            _LOG.info("%s: images or caches are new; its runs are planned on the newest versions", settings.name)
        newest = {uri: cache_version(one, uri) for uri, one in uris.items()}
        pins = Pins(open_index(settings).version, newest)
        storage.write_json(study_uri(settings, "pins.json"), vars(pins))
    for uri, version in pins.caches.items():
        holder = settings_digest({"study": settings.name, "output": settings.output, "version": version})
        FeatureCache.open(uri, version=version).pin(holder, {"name": settings.name, "study": study_uri(settings)})
    return pins


def _holds_all(settings: RunSettings, pins: Pins, uris: dict[str, RunSettings]) -> bool:
    if not uris.keys() <= pins.caches.keys():
        return False
    index = DatasetIndex.open(open_index(settings).uri, pins.index_version)
    rows = {row.name: row for row in index.rows()}
    for uri, one in uris.items():
        names = names_of_images(load_sets(one))
        if not names <= rows.keys():
            return False
        cache = FeatureCache.open(uri, version=pins.caches[uri])
        known = set(cache.keys()) | set(cache.quarantined())
        if any(rows[name].status == "ok" and rows[name].image_key not in known for name in names):
            return False
    return True


def distinct_caches(variants: Iterable[Variant]) -> dict[str, tuple[RunSettings, tuple[str, ...]]]:
    """Run of cache_features -> settings of its first variant, and all variants that read what it makes.

    Codecs that lose nothing of the encoder's numbers come first: the others can be made from them.
    """
    found: dict[str, tuple[RunSettings, list[str]]] = {}
    for variant in variants:
        digest = cache_features.find_run(variant.settings).digest
        found.setdefault(digest, (variant.settings, []))[1].append(variant.settings.name)
    ranked = sorted(found.items(), key=lambda item: _CODEC_RANK.get(item[1][0].cache.codec, 0))
    return {digest: (one, tuple(names)) for digest, (one, names) in ranked}


_CODEC_RANK = {"int8": 1}


def other_codec(settings: RunSettings) -> str | None:
    """The URI of the same features in a codec that this one can be made from; None where there is none."""
    identity = identity_of(settings)
    for codec in ("float32", "bfloat16", "float16"):
        if codec != settings.cache.codec:
            one = settings.model_copy(update={"cache": settings.cache.model_copy(update={"codec": codec})})
            uri = cache_uri(one, identity)
            try:
                cache_version(one, uri)
            except CacheError:
                continue
            return uri
    return None


def describe(changes: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in changes.items()) or "as the run file has it"
