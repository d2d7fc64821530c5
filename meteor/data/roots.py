"""URIs of images: names from annotation files, joined to the configured roots and never outside them."""

import os
import posixpath
from collections.abc import Mapping
from functools import lru_cache

from meteor import storage
from meteor.errors import ImagePathError, UnsafeNameError
from meteor.image.inside import file_of


def resolve_image(name: str, roots: Mapping[str, str]) -> str:
    """Return the URI of an image, without checking that the image exists.

    Args:
        name: the image's name in a sample: relative to a root, or an absolute path or s3:// URI inside a root.
        roots: prefix of a name -> folder or s3:// URI to which the rest of the name is joined; "" is the default. The
            longest prefix that fits wins, and a prefix ends at a slash (``coco`` means ``coco/``). With
            ``{"coco/": "s3://bucket/coco", "": "/data"}`` the name ``coco/train2017/1.jpg`` becomes
            ``s3://bucket/coco/train2017/1.jpg``. The root of images inside a single file is that file.

    Raises:
        ImagePathError: no root fits; the image is outside its root (by "..", another bucket or an absolute path) or, on local
            disk, a link to a place outside every root; or its name is too long for a file.
    """
    if not name or "\0" in name or name.encode(errors="replace").decode() != name:
        raise ImagePathError(f"{name!r} is no image name.")
    if "://" in name or name.startswith(("/", "~")):
        return _resolve_absolute(name, roots)
    prefixes = [prefix for prefix in roots if name.startswith(_as_folder(prefix))]
    if not prefixes:
        raise ImagePathError(
            f"No root is configured for the image {name!r}; prefixes known: {sorted(roots)}. Add its prefix, or '' for "
            f"all others, to the roots."
        )
    # The longest prefix is the most specific.
    prefix = max(prefixes, key=len)
    if prefix.startswith("@") and "#" in name:
        return _resolve_inside(name, prefix, roots[prefix])
    below = posixpath.normpath(name[len(_as_folder(prefix)) :])
    if below.split("/")[0] in ("..", "") or below == ".":
        raise ImagePathError(f"The image name {name!r} leaves its root {roots[prefix]!r}: name a file inside it.")
    root = storage.absolute(roots[prefix])
    try:
        return _checked(name, storage.join_below(root, below), roots)
    except UnsafeNameError as error:
        raise ImagePathError(f"The image name {error}.") from error


def _resolve_inside(name: str, prefix: str, root: str) -> str:
    """Return the URI of an image inside a data file; the file itself was named in the settings."""
    below, _, fragment = name[len(_as_folder(prefix)) :].rpartition("#")
    try:
        return f"{storage.join_below(root, below) if below else root}#{fragment}"
    except UnsafeNameError as error:
        raise ImagePathError(f"The image name {error}.") from error


def _resolve_absolute(name: str, roots: Mapping[str, str]) -> str:
    uri = _normalised(name)
    for root in map(storage.absolute, roots.values()):
        if _is_inside(uri, root):
            return _checked(name, uri, roots)
    raise ImagePathError(
        f"The image {name!r} is outside every root ({sorted(set(roots.values()))}): add its folder to the roots."
    )


def _checked(name: str, uri: str, roots: Mapping[str, str]) -> str:
    """Return the URI, or refuse it if a symbolic link in it leads out of all roots; a root itself may be a link."""
    if "://" in uri:
        return uri
    file = file_of(uri)
    folder, base = os.path.split(file)
    place = os.path.realpath(file) if os.path.islink(file) else os.path.join(_real_folder(folder), base)
    # The hub's cache, git-annex and DVC keep images as links to a folder beside, which may be declared as a root too.
    if not any(_is_inside(place, _real_folder(root)) for root in map(storage.absolute, roots.values())):
        raise ImagePathError(
            f"The image {name!r} is a link, or behind a link, to {place!r}, outside every root: add a root that contains it, "
            f"with a prefix that no image name has, such as data.roots={{..., 'linked': {os.path.dirname(place)!r}}}."
        )
    return uri


def _normalised(name: str) -> str:
    scheme, separator, path = name.partition("://")
    if not separator:
        return storage.absolute(name)
    return f"{scheme}://{posixpath.normpath(path)}"


def _is_inside(uri: str, root: str) -> bool:
    return uri.startswith(_as_folder(root))


def _as_folder(prefix: str) -> str:
    return prefix if not prefix or prefix.endswith("/") else prefix + "/"


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    # Cached, because hundreds of thousands of images share a few folders, and every part of a path costs a system call.
    return os.path.realpath(folder)
