"""The projector without a language model: a cache's images as files of visual tokens, scores and kept patches."""

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
    """Summary of a run over a cache.

    Attributes:
        folder: folder of the files.
        num_images: requested images, including quarantined images.
        num_before: images whose files existed before.
        num_written: images that this run wrote.
        num_sub_images: sub-images in the written files.
        num_tokens: visual tokens in the written files.
        num_bytes: bytes of the written files.
        quarantined: image key (or name) -> reason, for requested images without features.
        seconds: duration of the run.
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
        """Return the summary as lines for people."""
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
    """Write one file (see `image_bytes`) for each image whose file does not exist yet.

    After an interruption, start again with unchanged arguments. The run writes ``project.json`` first, which describes the
    folder's content, so that tokens of different projectors, caches or dtypes never share a folder.

    Args:
        cache: the cache, read in the version in which it was opened.
        projector: the projector on its device and in its dtype.
        folder_uri: folder of the files, local or s3://.
        keys: image keys; None for all images of the cache.
        names: image key -> name of the file below the folder, without ".safetensors"; the default is the image key.
        batch_size: sub-images per batch.
        overwrite: start over and delete the files of an earlier run in this folder.
        num_threads: images that are read, and files that are written, at the same time.
        on_progress: called with the number of finished images and of all images to write.

    Raises:
        CacheMismatchError: the projector was trained on another cache.
        CacheError: the cache is empty, a key is neither in it nor quarantined, or two images would have one name.
        SettingsError: the folder contains other files, or the batch size is below 1.
        DataError: tokens are not finite.
    """
    start = time.perf_counter()
    cache.identity.require_match(projector.cache_identity)
    if batch_size < 1:
        raise SettingsError(f"the batch size is {batch_size}; give a number of sub-images, 1 or more")
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


def _divide(cache: FeatureCache, requested: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """Divide the requested keys into those in the cache, each once, and the quarantined ones with their reasons."""
    reasons = cache.quarantined()
    keys = dict.fromkeys([*cache.keys(), *reasons] if requested is None else requested)
    held = [key for key in keys if key in cache]
    absent = [key for key in keys if key not in cache]
    if unknown := [key for key in absent if key not in reasons]:
        raise CacheError(
            f"{len(unknown)} of {len(keys)} images are not in version {cache.version} of {cache.uri}: "
            f"{', '.join(unknown[:_NUM_SHOWN])}; run cache_features over the data set"
        )
    if requested is None and not held:
        raise CacheError(f"{cache.uri} holds no images; run cache_features")
    return held, {key: reasons[key] for key in absent}


def _num(count: int, what: str) -> str:
    return f"{format_count(count)} {what}{'' if count == 1 else 's'}"
