"""The compressor alone: a cache's images as visual tokens, scores and kept patches in files, without a language model."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice

from meteor import storage
from meteor.cache import FeatureCache
from meteor.errors import CacheError, SettingsError
from meteor.evaluation.project_folder import FileWriter, claim_folder, describe_source, file_uris, image_bytes
from meteor.evaluation.projected import project_images
from meteor.formatting import format_bytes, format_count, format_duration
from meteor.model.trained_projector import TrainedProjector

_NUM_SHOWN = 5


@dataclass(frozen=True)
class Projection:
    """What a run over a cache did.

    Attributes:
        folder: where the files are.
        num_images: images that were asked for, quarantined ones included.
        num_before: those whose files were there already.
        num_written: those written now; the other counts are of these.
        num_sub_images, num_tokens, num_bytes: of what was written now.
        quarantined: reason by image key (or name) of images asked for that no features could be made of.
        seconds: that it took.
    """

    folder: str
    num_images: int
    num_before: int
    num_written: int
    num_sub_images: int
    num_tokens: int
    num_bytes: int
    quarantined: Mapping[str, str]
    seconds: float

    def to_text(self) -> str:
        """For people, a line each."""
        counts = f"{_num(self.num_written, 'image')}, {_num(self.num_sub_images, 'sub-image')}, "
        counts += f"{_num(self.num_tokens, 'token')}, {format_bytes(self.num_bytes)}"
        lines = [f"projected    {counts} in {format_duration(self.seconds)}"]
        if self.num_before:
            lines.append(f"done before  {_num(self.num_before, 'image')}")
        if self.quarantined:
            lines.append(f"quarantined  {_num(len(self.quarantined), 'image')}, not in the cache: {self._reasons()}")
        return "\n".join([*lines, f"folder       {self.folder}"])

    def _reasons(self) -> str:
        shown = ", ".join(f"{key} ({reason})" for key, reason in islice(self.quarantined.items(), _NUM_SHOWN))
        return shown + (", ..." if len(self.quarantined) > _NUM_SHOWN else "")


def project_cache(
    cache: FeatureCache,
    projector: TrainedProjector,
    folder_uri: str,
    *,
    keys: Sequence[str] | None = None,
    names: Mapping[str, str] | None = None,
    batch_size: int = 32,
    overwrite: bool = False,
    num_threads: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> Projection:
    """Write one file (`image_bytes` says what is in it) for each image, except those that are there already.

    A run that was cut off is started again with the same arguments. ``project.json``, written first, says what a folder
    holds, so that tokens of different projectors, caches or types never mix in one.

    Args:
        cache: read in the version that it was opened with.
        projector: on its device and in its type.
        folder_uri: local or s3://.
        keys: image keys; all of the cache when None.
        names: name of an image's file below the folder, without ".safetensors", by image key; the key where none is given.
        batch_size: sub-images that go through the projector together.
        overwrite: start over: what the folder holds of an earlier run is deleted.
        num_threads: images read, and files written, at the same time.
        on_progress: gets the number of images done and of all that were to be done.

    Raises:
        CacheMismatchError: the projector was trained on another cache.
        CacheError: the cache is empty, a key is neither in it nor quarantined, or two images would have one name.
        SettingsError: the folder holds other things, or the batch size is below 1.
        DataError: tokens are not finite.
    """
    start = time.perf_counter()
    cache.identity.require_match(projector.cache_identity)
    if batch_size < 1:
        raise SettingsError(f"the batch size is {batch_size}; give the sub-images of a batch, 1 or more")
    wanted, quarantined = _divide(cache, keys)
    files = file_uris(folder_uri, wanted, names or {})
    there = claim_folder(folder_uri, describe_source(cache, projector), files.values(), overwrite=overwrite)
    missing = [key for key in wanted if files[key] not in there]
    num_sub_images = num_tokens = 0
    with (
        closing(cache.prefetch(missing, num_threads=num_threads, attention_layers=[projector.select_layer])) as images,
        FileWriter(num_threads) as writer,
    ):
        results = project_images(projector, images, batch_size=batch_size)
        for num_done, result in enumerate(results, start=1):
            num_sub_images, num_tokens = num_sub_images + len(result.sub_images), num_tokens + result.num_tokens
            writer.write(files[result.image_key], partial(image_bytes, result, cache, projector))
            if on_progress:
                on_progress(num_done, len(missing))
    return Projection(
        folder=storage.absolute(folder_uri),
        num_images=len(wanted) + len(quarantined),
        num_before=len(wanted) - len(missing),
        num_written=len(missing),
        num_sub_images=num_sub_images,
        num_tokens=num_tokens,
        num_bytes=writer.num_bytes,
        quarantined=quarantined,
        seconds=time.perf_counter() - start,
    )


def _divide(cache: FeatureCache, asked: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """The keys that the cache holds, each once, and the reasons of those that are quarantined."""
    reasons = cache.quarantined()
    keys = dict.fromkeys([*cache.keys(), *reasons] if asked is None else asked)
    held = [key for key in keys if key in cache]
    absent = [key for key in keys if key not in cache]
    if unknown := [key for key in absent if key not in reasons]:
        raise CacheError(
            f"{len(unknown)} of {len(keys)} images are not in version {cache.version} of {cache.uri}: "
            f"{', '.join(unknown[:_NUM_SHOWN])}; run cache_features over the data set"
        )
    if asked is None and not held:
        raise CacheError(f"{cache.uri} holds no images; run cache_features")
    return held, {key: reasons[key] for key in absent}


def _num(count: int, what: str) -> str:
    return f"{format_count(count)} {what}{'' if count == 1 else 's'}"
