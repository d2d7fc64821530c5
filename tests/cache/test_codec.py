"""Codecs and rows: what is encoded comes back, what cannot be stored is refused."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meteor.cache import FEATURE_SCHEMA, encode_row, get_codec, read_row
from meteor.cache.codec import Int8Codec
from meteor.cache.row import PAYLOAD_COLUMNS
from meteor.errors import BadImageError, CacheError, CorruptPayloadError, SettingsError
from meteor.features import ImageFeatures

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


CHANNEL = st.tuples(
    st.floats(-1000, 1000, width=32), st.one_of(st.just(0.0), st.floats(2.0**-20, 4.0, width=32))
)  # centre and scale


def make_int8(*channels: tuple[float, float]) -> Int8Codec:
    """A codec of these (centre, scale) pairs, one a channel."""
    centres, scales = torch.tensor(channels).T
    return Int8Codec(scales.contiguous(), centres.contiguous(), "0123456789abcdef")


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
def test_values_that_are_not_finite_send_the_image_to_quarantine(make_image, field: str, value: float) -> None:
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


@given(
    channels=st.lists(CHANNEL, min_size=1, max_size=9),
    num_patches=st.integers(1, 7),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_int8_is_off_by_half_a_step_and_float16s_rounding_at_most(channels, num_patches, dtype, seed) -> None:
    codec = make_int8(*channels)
    share_PC = 2 * torch.rand(num_patches, len(channels), generator=torch.Generator().manual_seed(seed)) - 1
    feature_PC = (codec.centres + 127 * codec.scales * share_PC).to(dtype)
    # What the features' own rounding carried out of the range is clipped.
    inside_PC = (feature_PC - codec.centres).abs() <= 127 * codec.scales
    payload = codec.encode(feature_PC)
    assert len(payload) == codec.size_bytes(*feature_PC.shape) == feature_PC.numel()
    read_PC = codec.decode(bytearray(payload), *feature_PC.shape)
    assert read_PC.dtype == torch.float16
    exact_PC = feature_PC.double()
    rounding_PC = torch.clamp(exact_PC.abs() + codec.scales, min=2.0**-14) * 2.0**-11
    error_PC = (read_PC.double() - exact_PC).abs()
    assert (error_PC <= codec.scales * 0.5001 + 1.01 * rounding_PC)[inside_PC].all()


def test_int8_by_hand() -> None:
    codec = make_int8((40.0, 0.5), (0.0, 0.25), (7.0, 0.0))
    feature_PC = torch.tensor([[40.0, 0.0, 7.0], [39.6, 0.13, 7.0], [1e6, -1e6, -3.0]])
    payload = codec.encode(feature_PC)
    # Beyond 127 steps values are clipped; a constant channel holds its constant.
    assert payload == bytes([0, 0, 0, 256 - 1, 1, 0, 127, 256 - 127, 0])
    read_PC = codec.decode(bytearray(payload), 3, 3)
    assert read_PC.tolist() == [[40.0, 0.0, 7.0], [39.5, 0.25, 7.0], [103.5, -31.75, 7.0]]


def test_int8_rows_come_back_and_note_their_calibration(make_image) -> None:
    image = make_image("a", shape=1, layers=(-2, -5))
    codec = make_int8(*[(0.1, 0.05)] * 6)
    row = encode_row(image, codec)
    assert row.schema.metadata == {b"codec": b"int8", b"calibration": b"0123456789abcdef"}
    assert row["features"][0].as_py() == b"".join(codec.encode(part) for part in image.features)
    back = read_row(row, 0, codec)
    for stored, original in zip(back.features, image.features, strict=True):
        assert torch.equal(stored, codec.decode(bytearray(codec.encode(original)), *original.shape))
    assert all(torch.equal(*pair) for pair in zip(back.cls_attention, image.cls_attention, strict=True))


def test_a_full_sub_image_takes_0_6_megabytes_as_int8_and_1_2_as_float16() -> None:
    num_patches, width = 576, 1024
    image = ImageFeatures(
        "a" * 64,
        336,
        336,
        None,
        ((24, 24),),
        (-2,),
        [torch.randn(num_patches, width)],
        [torch.rand(1, num_patches)],
        torch.randn(1, width),
    )
    for codec, most in ((make_int8(*[(0.0, 0.03)] * width), 600_000), (get_codec("float16"), 1_190_000)):
        row = encode_row(image, codec)
        payload = sum(len(row[name][0].as_py()) for name in PAYLOAD_COLUMNS)
        assert payload == codec.size_bytes(num_patches, width) + 4 * num_patches + 4 * width
        assert payload <= most


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_int8_does_not_hide_what_is_not_finite(make_image, value: float) -> None:
    image = make_image("a", shape=1)
    image.features[1][3, 2] = value
    with pytest.raises(BadImageError, match=r"1 of 48 values of features"):
        encode_row(image, make_int8(*[(0.0, 0.05)] * 6))
    with pytest.raises(BadImageError, match=r"1 of 48 values of features"):
        make_int8(*[(0.0, 0.05)] * 6).encode(image.features[1])


def test_int8_of_another_width_is_refused() -> None:
    codec = make_int8((0.0, 1.0))
    with pytest.raises(CacheError, match=r"1 channels.*3"):
        codec.encode(torch.zeros(2, 3))
    with pytest.raises(CacheError, match=r"1 channels.*3"):
        codec.decode(bytearray(6), 2, 3)


def test_int8_belongs_to_a_cache() -> None:
    with pytest.raises(CacheError, match="open_codec"):
        get_codec("int8")


def test_a_pickled_codec_stores_the_same() -> None:
    codec = make_int8((40.0, 0.5), (0.0, 0.25))
    codec.encode(torch.ones(1, 2))
    again = pickle.loads(pickle.dumps(codec))
    assert again.encode(torch.full((1, 2), 3.0)) == codec.encode(torch.full((1, 2), 3.0))
    assert again.calibration_digest == codec.calibration_digest


def test_a_row_does_not_change_with_the_tensors_it_was_made_of(make_image) -> None:
    image = make_image("a")
    row = encode_row(image, get_codec("float32"))
    for tensor in (*image.features, *image.cls_attention, image.cls):
        tensor.zero_()
    assert read_row(row, 0, get_codec("float32")).cls.abs().sum() > 0


def test_rows_are_made_of_tensors_that_require_gradients(make_image) -> None:
    image = make_image("a")
    image.features[0].requires_grad_()
    for codec in (get_codec("float16"), make_int8(*[(0.0, 0.05)] * 6)):
        read_row(encode_row(image, codec), 0, codec)


def test_a_centre_pays_where_channels_lie_far_from_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.zeros(200), torch.ones(200)
    mean[::100], std[::100] = 40.0, 2.0
    sample_PC, other_PC = (mean + std * torch.randn(2000, 200, generator=generator) for _ in range(2))
    low, high = sample_PC.amin(dim=0), sample_PC.amax(dim=0)
    largest = torch.maximum(low.abs(), high.abs())
    affine = Int8Codec((high - low) / 254, (high + low) / 2, "affine")
    symmetric = Int8Codec(largest / 127, torch.zeros(200), "symmetric")
    affine_error, symmetric_error = (
        # Of the outlier channels, in units of their spread.
        float((codec.decode(bytearray(codec.encode(other_PC)), 2000, 200) - other_PC)[:, ::100].std() / 2.0)
        for codec in (affine, symmetric)
    )
    assert affine_error < 0.015
    assert symmetric_error > 3 * affine_error
