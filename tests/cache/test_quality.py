"""Measured errors: hand-worked cases, the same as a reader finds, and nothing where nothing was measured."""

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from meteor import storage
from meteor.cache import (
    FeatureCache,
    calibrate,
    commit,
    create_cache,
    encode_row,
    get_codec,
    read_row,
    summarise_errors,
    write_feature_file,
    writer,
)
from meteor.cache.manifest import read_keys
from meteor.cache.quality import QUALITY_COLUMNS, Quality, measure_differences
from meteor.cache.row import IMAGE_FIELDS
from meteor.cache.table import versioned
from meteor.cache.writer import KEY_SCHEMA


def measure(features, read_features, attention=None, read_attention=None) -> Quality:
    attention = attention or [torch.ones(1, len(part)) for part in features]
    return measure_differences(features, read_features, attention, read_attention or attention).quality()


def test_errors_of_a_case_worked_by_hand() -> None:
    features = [torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0]])]
    read_features = [torch.tensor([[4.0, 3.0], [0.0, 2.0]]), torch.tensor([[2.0, 0.0]])]
    quality = measure(features, read_features)
    assert quality.relative_error == pytest.approx(math.sqrt((1 + 1 + 1) / (9 + 16 + 4 + 1)))
    assert quality.min_cosine == pytest.approx(24 / 25)
    assert quality.top_k_agreement == 1.0


def test_top_patches_are_compared_within_each_sub_image_and_layer() -> None:
    falling = torch.arange(200, 0, -1.0)
    swapped = falling.clone()
    # Patches 0 to 2 fall out of the best 144, patches 197 to 199 come in.
    swapped[:3], swapped[197:] = 0.5, 300.0
    short = torch.rand(2, 5)
    features = [torch.ones(200, 3), torch.ones(5, 3)]
    quality = measure(
        features, features, [torch.stack([falling, falling]), short], [torch.stack([falling, swapped]), -short]
    )
    # Of a sub-image of 5 patches all are among the best, in whatever order.
    assert quality.top_k_agreement == pytest.approx(1 - 3 / (144 + 144 + 5 + 5))


def test_patches_of_zeros_lose_nothing_when_they_stay_zeros() -> None:
    zeros, ones = [torch.zeros(2, 3)], [torch.ones(2, 3)]
    assert measure(zeros, zeros) == Quality(0.0, 1.0, 1.0)
    assert measure(zeros, ones) == Quality(1.0, 0.0, 1.0)
    assert measure(ones, zeros) == Quality(1.0, 0.0, 1.0)


@pytest.mark.parametrize("codec_name", ["float16", "bfloat16", "float32", "int8"])
def test_a_row_notes_the_error_that_a_reader_finds(make_identity, make_image, tmp_path: Path, codec_name: str) -> None:
    images = [make_image(str(i), shape=i) for i in range(3)]
    codec = calibrate(create_cache(str(tmp_path), make_identity(), codec_name), images)
    for image in images:
        row = encode_row(image, codec)
        read = torch.cat(read_row(row, 0, codec).features).double()
        original = torch.cat(image.features).double()
        error = (read - original).norm() / original.norm()
        assert row["relative_error"][0].as_py() == pytest.approx(float(error), rel=1e-3)
        lowest = torch.cosine_similarity(read, original, dim=1).min()
        assert row["min_cosine"][0].as_py() == pytest.approx(float(lowest), abs=1e-6)
        assert row["top_k_agreement"][0].as_py() == 1.0
    assert (float(error) == 0) == (codec_name == "float32")


def test_features_in_the_codecs_own_type_lose_nothing(make_image) -> None:
    image = make_image("a", shape=1)
    image.features[:] = [part.half() for part in image.features]
    fields = encode_row(image, get_codec("float16")).select(QUALITY_COLUMNS).to_pylist()[0]
    assert fields == {"relative_error": 0.0, "min_cosine": 1.0, "top_k_agreement": 1.0}


def test_what_cannot_be_measured_is_null_and_the_row_is_kept(make_image) -> None:
    image = make_image("a", layers=())
    image.features[0][1, 2] = 1e30
    row = encode_row(image, get_codec("bfloat16"))
    assert row.select(QUALITY_COLUMNS).to_pylist() == [dict.fromkeys(QUALITY_COLUMNS)]
    assert torch.equal(read_row(row, 0, get_codec("bfloat16")).features[0], image.features[0].bfloat16())


def test_a_caches_errors_are_summed_up_from_its_key_index(make_identity, make_image, root: str) -> None:
    images = [make_image(str(i), shape=i) for i in range(4)]
    uri = create_cache(root, make_identity(), "float16")
    rows = [encode_row(image, get_codec("float16")) for image in images]
    write_feature_file(uri, rows)
    commit(uri)
    errors = [row["relative_error"][0].as_py() for row in rows]
    summary = summarise_errors(read_keys(uri, FeatureCache.open(uri).manifest))
    assert summary == {
        "num_images": 4,
        "mean_relative_error": pytest.approx(sum(errors) / 4),
        "max_relative_error": max(errors),
        "min_cosine": min(row["min_cosine"][0].as_py() for row in rows),
        "mean_top_k_agreement": 1.0,
    }
    assert set(summarise_errors(KEY_SCHEMA.empty_table()).values()) == {0, None}


def test_files_of_schema_version_1_are_read_and_were_not_measured(
    make_identity, make_image, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [make_image(str(i), shape=i) for i in range(3)]
    uri = create_cache(root, make_identity(), "float16")
    with monkeypatch.context() as patched:
        write_as_version_1(patched)
        record = write_feature_file(uri, [encode_row(image, get_codec("float16")) for image in images])
    old = pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(uri, record.file))))
    assert not set(QUALITY_COLUMNS) & {*old.column_names, *record.rows.column_names}
    commit(uri)
    cache = FeatureCache.open(uri)
    assert all(read_keys(uri, cache.manifest)[name].null_count == 3 for name in QUALITY_COLUMNS)
    assert summarise_errors(read_keys(uri, cache.manifest))["num_images"] == 0
    assert cache.verify() == []
    for image in images:
        assert torch.equal(cache.get(image.image_key).features[0], image.features[0].half())
    # Old rows go into new files, beside rows that were measured.
    assert read_row(old, 1, get_codec("float16")).image_key == images[1].image_key
    new = encode_row(make_image("new"), get_codec("float16"))
    errors = write_feature_file(uri, [old.slice(1, 1), new]).rows["relative_error"].to_pylist()
    assert errors == [None, new["relative_error"][0].as_py()]


def write_as_version_1(patched: pytest.MonkeyPatch) -> None:
    """Write files as the release before these columns did."""
    for name in ("FEATURE_SCHEMA", "KEY_SCHEMA"):
        fields = [field for field in getattr(writer, name) if field.name not in QUALITY_COLUMNS]
        patched.setattr(writer, name, versioned(pa.schema(fields), 1))
    patched.setattr(writer, "_IMAGE_COLUMNS", [field.name for field in IMAGE_FIELDS if not field.nullable])
    patched.setattr(writer, "CACHE_SCHEMA_VERSION", 1)
