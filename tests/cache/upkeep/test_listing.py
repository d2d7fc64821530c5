"""What lies below a root: every cache with its numbers, the damaged ones with what is wrong. On disk and on S3."""

import json
from pathlib import Path

from meteor import storage
from meteor.cache import (
    FeatureCache,
    QuarantineRow,
    commit,
    create_cache,
    encode_row,
    get_codec,
    record_quarantine,
    write_feature_file,
)
from meteor.cache.upkeep.listing import list_caches
from meteor.features import ImageFeatures


def write(cache_uri: str, *images: ImageFeatures, codec: str = "float16") -> None:
    write_feature_file(cache_uri, [encode_row(image, get_codec(codec)) for image in images])


def test_each_cache_comes_with_its_numbers(root: str, make_identity, make_image) -> None:
    assert list_caches(root) == []
    full = create_cache(root, make_identity(), "float16")
    write(full, make_image("a", shape=0), make_image("b", shape=1))
    commit(full)
    write(full, make_image("c", shape=2), make_image("c", shape=2))
    record_quarantine(full, [QuarantineRow("", "bad.png", "empty", "")])
    commit(full)
    FeatureCache.open(full).pin("run", {})
    empty = create_cache(root, make_identity(), "float32")
    other = create_cache(root, make_identity(select_layer=-1), "float16")
    storage.write_bytes(storage.join(root, "index", "v00000001.parquet"), b"not a cache")
    listed = {listing.uri: listing for listing in list_caches(root)}
    assert list(listed) == sorted([full, empty, other])
    found = listed[full]
    cache = FeatureCache.open(full)
    assert (found.version, found.num_images, found.num_sub_images) == (2, 3, 1 + 3 + 4)
    assert (found.num_quarantined, found.num_pins) == (1, 1)
    assert found.payload_bytes == cache.num_bytes
    assert found.identity == make_identity()
    assert (found.key, found.codec, found.error) == (make_identity().key, "float16", "")
    files = storage.list_objects(full)
    assert (found.num_files, found.stored_bytes) == (len(files), sum(info.size_bytes for info in files))
    assert json.loads(json.dumps(found.to_dict()))["identity"] == make_identity().to_dict()
    assert "version 2, 3 images, 8 sub-images" in found.to_text()
    assert found.created_s == min(info.modified_s for info in files)
    assert found.modified_s == max(info.modified_s for info in files)
    assert (listed[empty].version, listed[empty].num_images, listed[empty].error) == (0, 0, "")
    assert listed[other].identity == make_identity(select_layer=-1)


def test_one_listing_serves_all_caches_and_no_table_is_read(
    tmp_path: Path, make_identity, make_image, monkeypatch
) -> None:
    for layer in (-1, -2, -3):
        uri = create_cache(str(tmp_path), make_identity(select_layer=layer), "float16")
        write(uri, make_image("a"))
        commit(uri)
    listings, reads = [], []
    real_list, real_read = storage.list_objects, storage.read_bytes
    monkeypatch.setattr(storage, "list_objects", lambda uri: (listings.append(uri), real_list(uri))[1])
    monkeypatch.setattr(storage, "read_bytes", lambda uri: (reads.append(uri), real_read(uri))[1])
    assert [listing.num_sub_images for listing in list_caches(str(tmp_path))] == [1, 1, 1]
    assert listings == [str(tmp_path)]
    assert len(reads) == 6
    assert all(uri.endswith(".json") for uri in reads)


def test_damaged_caches_are_listed_with_their_error(tmp_path: Path, make_identity, make_image) -> None:
    uris = [create_cache(str(tmp_path), make_identity(select_layer=layer), "float16") for layer in (-1, -2, -3, -4)]
    for uri in uris:
        write(uri, make_image("a"))
        commit(uri)
    Path(uris[0], "identity.json").unlink()
    Path(uris[1], "identity.json").write_bytes(b"{")
    Path(uris[2], "manifests/v00000001.json").write_bytes(b"{}")
    Path(uris[3], "identity.json").write_text(Path(uris[3], "identity.json").read_text().replace("-4", "-5"))
    listed = {listing.uri: listing for listing in list_caches(str(tmp_path))}
    assert sorted(listed) == sorted(uris)
    found = [listed[uri] for uri in uris]
    for listing, words in zip(found, ["lacks identity.json", "valid JSON", "damaged", "it was moved"], strict=True):
        assert words in listing.error
        assert listing.error in listing.to_text()
    assert [listing.identity is None for listing in found] == [True, True, False, False]
    assert [listing.num_images for listing in found] == [1, 1, 0, 1]


def test_a_manifest_of_an_older_release_is_counted_from_its_tables(tmp_path: Path, make_identity, make_image) -> None:
    uri = create_cache(str(tmp_path), make_identity(), "float16")
    write(uri, make_image("a", shape=1), make_image("b", shape=2))
    record_quarantine(uri, [QuarantineRow("", "bad.png", "empty", "")])
    commit(uri)
    manifest = storage.join(uri, "manifests", "v00000001.json")
    content = storage.read_json(manifest)
    del content["num_sub_images"], content["num_quarantined"]
    storage.write_json(manifest, {**content, "schema_version": 1})
    [listing] = list_caches(str(tmp_path))
    assert (listing.num_sub_images, listing.num_quarantined, listing.error) == (3 + 4, 1, "")
    assert len(FeatureCache.open(uri)) == 2
