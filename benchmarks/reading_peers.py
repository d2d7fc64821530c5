"""Other formats for the images of `cache_reading.py`: WebDataset, Mosaic MDS, and a .pt file per image."""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from meteor.features import ImageFeatures

Check = Callable[[str, Any], None]
Read = Callable[[Sequence[str]], None]
INSTALL = {
    "webdataset": "pip install --no-deps webdataset braceexpand",
    # The package declares older versions of numpy and transformers, but works with newer ones.
    "streaming": "pip install --no-deps mosaicml-streaming Brotli python-snappy cramjam xxhash zstd catalogue",
}


class Peer:
    """Format whose images are written one by one and then read."""

    name: ClassVar[str]
    checksum: ClassVar[str]

    def write(self, image: ImageFeatures, payload: bytes) -> None:
        """Add an image; ``payload`` is the bytes that the feature cache stores for it."""
        raise NotImplementedError

    def finish(self) -> None:
        """Close the files after the last image."""

    def readers(self, check: Check) -> tuple[Read, Read]:
        """Return a reader in random order and a reader in the order in which the images were written."""
        raise NotImplementedError


def open_peers(folder: Path, images_per_file: int) -> Iterator[Peer]:
    """Yield the formats whose packages are installed; print a line for each of the others."""
    yield PtFiles(folder / "pt")
    for package, make in (("webdataset", WebDatasetTar), ("streaming", MosaicMds)):
        if importlib.util.find_spec(package) is None:
            print(f"left out: {make.name}; {INSTALL[package]}")
        else:
            yield make(folder / package, images_per_file)


class PtFiles(Peer):
    """Files of `torch.save`, one per image, as SimpleTuner and others use; torch verifies no checksum."""

    name, checksum = "a .pt file each", "none"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True)

    def write(self, image: ImageFeatures, payload: bytes) -> None:
        tensors = {"features": image.features, "cls_attention": image.cls_attention, "cls": image.cls}
        torch.save(tensors, self._folder / f"{image.image_key}.pt")

    def readers(self, check: Check) -> tuple[Read, Read]:
        def read(keys: Sequence[str]) -> None:
            for key in keys:
                torch.load(self._folder / f"{key}.pt", weights_only=True)

        return read, read


class WebDatasetTar(Peer):
    """Tar files of 32 images."""

    name, checksum = "WebDataset tar", "crc32"

    def __init__(self, folder: Path, images_per_file: int) -> None:
        import webdataset

        folder.mkdir(parents=True)
        self._webdataset, self._folder, self._images_per_file = webdataset, folder, images_per_file
        self._urls: list[str] = []
        self._num_written, self._writer = 0, None

    def write(self, image: ImageFeatures, payload: bytes) -> None:
        if self._num_written % self._images_per_file == 0:
            self.finish()
            self._urls.append(str(self._folder / f"{len(self._urls):05d}.tar"))
            self._writer = self._webdataset.TarWriter(self._urls[-1])
        self._writer.write({"__key__": image.image_key, "bin": payload})
        self._num_written += 1

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def readers(self, check: Check) -> tuple[Read, Read]:
        def read(keys: Sequence[str], *, shuffled: bool) -> None:
            dataset = self._webdataset.WebDataset(self._urls, shardshuffle=len(self._urls) if shuffled else False)
            if shuffled:
                dataset = dataset.shuffle(self._images_per_file)
            num_read = 0
            for sample in dataset:
                check(sample["__key__"], sample["bin"])
                num_read += 1
            assert num_read == len(keys)

        return lambda keys: read(keys, shuffled=True), lambda keys: read(keys, shuffled=False)


class MosaicMds(Peer):
    """Mosaic's shards of 64 MB (the default), without their hashes, which are checked only after downloads."""

    name, checksum = "Mosaic MDS", "crc32"

    def __init__(self, folder: Path, images_per_file: int) -> None:
        self._streaming, self._folder = _import_streaming(), folder
        self._writer = self._streaming.MDSWriter(out=str(folder), columns={"key": "str", "payload": "bytes"})
        self._places: dict[str, int] = {}

    def write(self, image: ImageFeatures, payload: bytes) -> None:
        self._places[image.image_key] = len(self._places)
        self._writer.write({"key": image.image_key, "payload": payload})

    def finish(self) -> None:
        self._writer.finish()

    def readers(self, check: Check) -> tuple[Read, Read]:
        dataset = self._streaming.LocalDataset(str(self._folder))

        def read(keys: Sequence[str]) -> None:
            for key in keys:
                check(key, dataset[self._places[key]]["payload"])

        return read, read


def _import_streaming() -> Any:
    """Import `streaming.base` without `streaming.vision`, which needs torchvision."""
    spec = importlib.util.find_spec("streaming")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package = types.ModuleType("streaming")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["streaming"] = package
    return importlib.import_module("streaming.base")
