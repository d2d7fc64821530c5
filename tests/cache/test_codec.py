"""Codecs and rows: what is encoded comes back, what cannot be stored is refused."""

import pytest
import torch

from meteor.cache import FEATURE_SCHEMA, ImageFeatures, encode_row, get_codec, read_row
from meteor.errors import BadImageError, CacheError, CorruptPayloadError, SettingsError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def with_features(image: ImageFeatures, **changes) -> ImageFeatures:
    return ImageFeatures(**{**vars(image), **changes})


@pytest.mark.parametrize("codec", DTYPES)
@pytest.mark.parametrize("shape", range(3))
def test_a_row_holds_the_image_in_the_codecs_precision(make_image, codec: str, shape: int) -> None:
    image = make_image("a", shape=shape, layers=(-2, -5))
    row = encode_row(image, get_codec(codec))
    assert row.schema == FEATURE_SCHEMA
    back = read_row(row, 0, get_codec(codec))
    for name in ("image_key", "width", "height", "grid", "patch_grids", "attention_layers"):
        assert getattr(back, name) == getattr(image, name)
    assert back.num_sub_images == len(image.patch_grids)
    for stored, original in zip(back.features, image.features, strict=True):
        assert stored.dtype == DTYPES[codec]
        assert torch.equal(stored, original.to(DTYPES[codec]))
    for stored, original in zip(back.cls_attention, image.cls_attention, strict=True):
        assert torch.equal(stored, original)
    assert torch.equal(back.cls, image.cls)


@pytest.mark.parametrize("codec", DTYPES)
def test_bytes_are_the_row_major_little_endian_values(codec: str) -> None:
    feature_PC = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, 65504.0 if codec == "float16" else 1.0]])
    payload = get_codec(codec).encode(feature_PC.T.contiguous().T)
    assert len(payload) == get_codec(codec).size_bytes(2, 3)
    if codec == "float32":
        assert payload == feature_PC.numpy().astype("<f4").tobytes()
    elif codec == "float16":
        assert payload == feature_PC.numpy().astype("<f2").tobytes()
    else:
        assert payload == (feature_PC.numpy().astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()


def test_decoding_shares_the_memory_it_was_given() -> None:
    payload = bytearray(get_codec("float32").encode(torch.zeros(2, 3)))
    decoded = get_codec("float32").decode(payload, 2, 3)
    decoded[1, 2] = 1.0
    assert payload[-4:] == b"\x00\x00\x80\x3f"


def test_an_image_without_attention_is_a_row_too(make_image) -> None:
    back = read_row(encode_row(make_image("a", shape=1, layers=()), get_codec("float16")), 0, get_codec("float16"))
    assert [tuple(attention.shape) for attention in back.cls_attention] == [(0, 9), (0, 8), (0, 8)]


@pytest.mark.parametrize("field", ["features", "cls_attention", "cls"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_send_the_picture_to_quarantine(make_image, field: str, value: float) -> None:
    image = make_image("a", shape=1)
    bad = getattr(image, field)[0] if field != "cls" else image.cls
    bad.view(-1)[1] = value
    with pytest.raises(BadImageError, match=f"1 of .* {field}") as caught:
        encode_row(image, get_codec("float16"))
    assert caught.value.reason == "non_finite_features"


def test_values_too_large_for_the_codec_are_refused_rather_than_stored_as_infinity(make_image) -> None:
    image = make_image("a")
    image.features[0][0, 0] = 1e5
    with pytest.raises(BadImageError, match="bfloat16"):
        encode_row(image, get_codec("float16"))
    assert torch.isfinite(
        read_row(encode_row(image, get_codec("bfloat16")), 0, get_codec("bfloat16")).features[0]
    ).all()


def test_shapes_that_contradict_each_other_are_refused(make_image) -> None:
    image = make_image("a", shape=1)
    for changes in [
        {"features": image.features[:2]},
        {"features": [image.features[1], image.features[0], image.features[2]]},
        {"cls_attention": [attention[0] for attention in image.cls_attention]},
        {"cls": image.cls[:2]},
        {"grid": None},
        {"grid": (2, 2)},
        {"attention_layers": (-2, -3)},
    ]:
        with pytest.raises(CacheError, match=next(iter(changes)).replace("attention_layers", "cls_attention")):
            with_features(image, **changes)


def test_a_changed_row_does_not_pass_its_checksum(make_image) -> None:
    row = encode_row(make_image("a"), get_codec("float16"))
    payload = bytearray(row["features"][0].as_py())
    payload[7] ^= 1
    fields = {**row.to_pylist()[0], "features": bytes(payload)}
    with pytest.raises(CorruptPayloadError, match=fields["image_key"]):
        read_row(type(row).from_pylist([fields], schema=FEATURE_SCHEMA), 0, get_codec("float16"))


def test_a_row_of_another_codec_is_refused(make_image) -> None:
    with pytest.raises(CacheError, match="float32"):
        read_row(encode_row(make_image("a"), get_codec("float16")), 0, get_codec("float32"))


def test_an_unknown_codec_names_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"'zip'.*float16.*bfloat16"):
        get_codec("zip")


def test_attention_is_given_for_the_layers_asked_for(make_image) -> None:
    image = make_image("a", shape=1, layers=(-2, -5, -8))
    chosen = image.with_attention((-8, -2))
    assert chosen.attention_layers == (-8, -2)
    for got, whole in zip(chosen.cls_attention, image.cls_attention, strict=True):
        assert torch.equal(got, whole[[2, 0]])
    with pytest.raises(CacheError, match=r"\[-3\].*cache_features"):
        image.with_attention((-2, -3))
