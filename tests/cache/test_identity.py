"""The cache key: sensitive to every field that changes a feature, to nothing else."""

import hashlib
import json
from dataclasses import asdict

import pytest

from meteor.cache import CacheIdentity, algorithm_versions, create_cache
from meteor.errors import CacheError, CacheMismatchError, SettingsError

CHANGES = {
    "encoder_digest": "f" * 64,
    "encoder_dtype": "bfloat16",
    "select_layer": -1,
    "preprocessing.mean": [0.5, 0.4, 0.31],
    "preprocessing.std": [0.2, 0.2, 0.2],
    "preprocessing.rescale": "1/256",
    "slicing.max_slices": 7,
    "slicing.resolution": 448,
    "slicing.patch_size": 16,
    "versions.slicing": 2,
    "versions.resizing": 2,
    "versions.encoding": 2,
    "importance": "pooling_query",
    "resample": "bilinear",
}


def changed(identity: CacheIdentity, path: str, value: object) -> CacheIdentity:
    fields = json.loads(json.dumps(identity.to_dict()))
    name, _, part = path.partition(".")
    if part:
        fields[name][part] = value
    else:
        fields[name] = value
    return CacheIdentity.from_dict(fields)


@pytest.mark.parametrize("path", CHANGES)
def test_each_field_changes_the_key_and_is_named_in_the_refusal(make_identity, path: str) -> None:
    cached, needed = make_identity(), changed(make_identity(), path, CHANGES[path])
    assert cached.key != needed.key
    assert [line.partition(":")[0] for line in cached.differences(needed)] == [path]
    with pytest.raises(CacheMismatchError, match=f"{path}: .* != "):
        cached.require_match(needed)


def test_every_field_of_an_identity_is_tried_above(make_identity) -> None:
    parts = asdict(make_identity())
    paths = {f"{name}.{part}" for name in parts if isinstance(parts[name], dict) for part in parts[name]}
    assert paths | {name for name in parts if not isinstance(parts[name], dict)} == set(CHANGES)


def test_the_difference_is_readable(make_identity) -> None:
    assert make_identity().differences(make_identity(select_layer=-1)) == ["select_layer: -2 != -1"]


def test_the_key_is_the_digest_of_canonical_json(make_identity) -> None:
    canonical = (
        '{"encoder_digest":"'
        + "e" * 64
        + '","encoder_dtype":"float32","preprocessing":{"mean":[0.5,0.4,0.3],"rescale":"1/255",'
        '"std":[0.2,0.2,0.25]},"select_layer":-2,"slicing":{"max_slices":6,"patch_size":14,"resolution":336},'
        '"versions":{"encoding":1,"resizing":1,"slicing":1}}'
    )
    assert make_identity().key == hashlib.sha256(canonical.encode()).hexdigest()


def test_spelling_does_not_change_the_key(make_identity) -> None:
    one = make_identity(preprocessing={"mean": (0, 0, 0), "std": (1, 1, 1), "rescale": "1/255"})
    other = make_identity(preprocessing={"rescale": "1/255", "std": [1.0, 1.0, 1.0], "mean": [0.0, 0.0, 0.0]})
    assert one.key == other.key
    assert one == other
    one.require_match(other)


def test_an_identity_survives_json(make_identity) -> None:
    identity = make_identity(versions=algorithm_versions())
    assert CacheIdentity.from_dict(json.loads(json.dumps(identity.to_dict()))) == identity
    siglip = make_identity(importance="pooling_query", resample="bilinear")
    assert CacheIdentity.from_dict(json.loads(json.dumps(siglip.to_dict()))) == siglip


def test_caches_of_clip_keep_the_fields_they_had_before_there_were_other_encoders(make_identity) -> None:
    assert not {"importance", "resample"} & set(make_identity().to_dict())
    assert {"importance", "resample"} < set(make_identity(importance="a", resample="b").to_dict())


def test_missing_and_unknown_fields_are_refused(make_identity) -> None:
    with pytest.raises(CacheError, match="patch_size"):
        make_identity(slicing={"max_slices": 6, "resolution": 336})
    with pytest.raises(CacheError, match="size"):
        make_identity(preprocessing={"mean": [0] * 3, "std": [1] * 3, "rescale": "1/255", "size": 336})
    with pytest.raises(CacheError, match="codec"):
        CacheIdentity.from_dict({**make_identity().to_dict(), "codec": "float16"})
    with pytest.raises(CacheError, match="select_layer"):
        CacheIdentity.from_dict({"encoder_digest": "e"})


def test_codecs_are_variants_beside_each_other_under_one_key(make_identity, root: str) -> None:
    identity = make_identity()
    uris = [create_cache(root, identity, codec) for codec in ("float16", "bfloat16")]
    assert [uri.split("/")[-2:] for uri in uris] == [[identity.key, "float16"], [identity.key, "bfloat16"]]
    assert create_cache(root, identity, "float16") == uris[0]
    with pytest.raises(SettingsError, match=r"float12.*float16"):
        create_cache(root, identity, "float12")


def test_a_folder_with_another_identity_is_refused(make_identity, tmp_path) -> None:
    uri = create_cache(str(tmp_path), make_identity(), "float16")
    other = make_identity(select_layer=-1)
    (tmp_path / other.key).mkdir()
    (tmp_path / make_identity().key / "float16").rename(tmp_path / other.key / "float16")
    with pytest.raises(CacheMismatchError, match="select_layer: -2 != -1"):
        create_cache(str(tmp_path), other, "float16")
    assert uri.endswith("float16")
