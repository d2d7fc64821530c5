import io
import json

import pytest
from PIL import Image

from meteor import storage
from meteor.data.sample_sets import SampleSet
from meteor.data.samples import Sample, SampleProblem
from meteor.data.sources import find_source
from meteor.image.pixels import PixelSettings
from meteor.image.slicing import plan_slices
from meteor.planning.data_check import CheckedSet, check_data
from meteor.text.conversation import Turn


def make_image(width=40, height=30, image_format="PNG", seed=0, **kwargs):
    sink = io.BytesIO()
    Image.effect_noise((width, height), 50 + seed).convert("RGB").save(sink, image_format, **kwargs)
    return sink.getvalue()


def make_folder(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return {"": str(folder)}


def make_sample(sample_id, *images):
    return Sample(sample_id, images, (Turn("human", "hi", len(images)), Turn("gpt", "ho")))


def check(samples, roots, problems=(), **kwargs):
    count_tokens = kwargs.pop("count_tokens", lambda position, plans: 10)
    checked = CheckedSet(SampleSet.of("finetune", samples, problems), max_length=100, count_tokens=count_tokens)
    return check_data({"finetune": checked}, roots=roots, num_threads=2, **({"pixels": PixelSettings()} | kwargs))


def bad_images(report):
    return {shown.name: shown.reason for source in report.sets[0].sources for shown in source.bad}


def test_good_data_are_ok(tmp_path):
    roots = make_folder(tmp_path, {"coco/train2017/1.jpg": make_image(image_format="JPEG")})
    report = check([make_sample("a", "coco/train2017/1.jpg"), make_sample("t")], roots)
    assert report.ok
    (one,) = report.sets
    assert (one.num_samples, one.num_usable, one.num_text_only) == (2, 2, 1)
    assert "can be used as they are" in report.to_text()


@pytest.mark.parametrize("full", [False, True])
def test_images_that_cannot_be_used_are_named_with_their_reason(tmp_path, full):
    files = {
        "good.png": make_image(),
        "empty.jpg": b"",
        "text.jpg": b"<html>not found</html>",
        "long.png": make_image(600, 10),
        "large.png": make_image(500, 500),
    }
    roots = make_folder(tmp_path, files)
    names = [*files, "gone.jpg", "../out.jpg"]
    report = check(
        [make_sample(name, name) for name in names], roots, full=full, pixels=PixelSettings(max_pixels=200_000)
    )
    assert bad_images(report) == {
        "empty.jpg": "empty",
        "text.jpg": "not_an_image",
        "long.png": "aspect_ratio",
        "large.png": "too_many_pixels",
        "gone.jpg": "missing",
        "../out.jpg": "outside_roots",
    }
    assert (report.ok, report.sets[0].num_usable, report.sets[0].num_without_images) == (False, 1, 6)
    text = report.to_text()
    assert all(name in text for name in bad_images(report))


def test_a_truncated_image_is_found_by_reading_it_whole(tmp_path):
    roots = make_folder(tmp_path, {"1.png": make_image(400, 400)[:-3000]})
    samples = [make_sample("a", "1.png")]
    assert check(samples, roots).ok
    assert bad_images(check(samples, roots, full=True)) == {"1.png": "truncated"}


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_sub_images_are_counted_from_the_size_as_displayed(tmp_path, image_format):
    size = (1000, 400)
    exif = Image.Exif()
    exif[0x0112] = 6
    kwargs = {} if image_format in ("GIF", "BMP", "TIFF") else {"exif": exif}
    roots = make_folder(tmp_path, {"1.img": make_image(*size, image_format=image_format, **kwargs)})
    expected = plan_slices(*(size[::-1] if kwargs else size))
    seen = []
    for full in (False, True):
        check(
            [make_sample("a", "1.img")], roots, full=full, count_tokens=lambda position, plans: seen.append(plans) or 1
        )
    assert seen == [[expected], [expected]]


def test_the_header_is_enough_and_little_is_read(tmp_path, monkeypatch):
    roots = make_folder(tmp_path, {"1.png": make_image(900, 700), "2.jpg": make_image(900, 700, "JPEG", quality=99)})
    monkeypatch.setattr(storage, "read_bytes", None)
    report = check([make_sample("a", "1.png"), make_sample("b", "2.jpg")], roots)
    assert report.ok
    assert report.sets[0].sub_images == {plan_slices(900, 700).num_sub_images: 2}


def test_a_size_behind_a_long_header_is_found_by_reading_on(tmp_path):
    blocks = b"".join(b"\xff\xe9" + (60_002).to_bytes(2, "big") + bytes(60_000) for _ in range(4))
    jpeg = make_image(image_format="JPEG")
    roots = make_folder(tmp_path, {"1.jpg": jpeg[:2] + blocks + jpeg[2:]})
    assert check([make_sample("a", "1.jpg")], roots).sets[0].sub_images == {1: 1}


def test_problems_of_records_and_of_tokens_are_counted(tmp_path):
    def count_tokens(position, plans):
        return SampleProblem("b", "tokenisation", "no answer token") if position == 1 else 10

    problems = [SampleProblem("x", "image_without_placeholder", "image without <image>")]
    report = check([make_sample("a"), make_sample("b")], {}, problems, count_tokens=count_tokens)
    assert [problem.reason for problem in report.sets[0].problems] == ["image_without_placeholder", "tokenisation"]
    assert (report.sets[0].num_samples, report.sets[0].num_usable, report.ok) == (3, 1, False)
    assert "image_without_placeholder: 1 samples: x (image without <image>)" in report.to_text()


def test_a_set_without_samples_is_not_ok():
    assert not check([], {}).ok


def test_over_long_samples_are_told_and_lengths_counted_by_powers_of_two():
    lengths = {"a": 1, "b": 64, "c": 65, "d": 100, "e": 101, "f": 128}
    report = check([make_sample(name) for name in lengths], {}, count_tokens=lambda i, plans: [*lengths.values()][i])
    assert report.sets[0].over_long == ("e", "f")
    assert report.sets[0].tokens == {1: 1, 64: 1, 128: 4}
    assert report.ok
    assert "2 samples are longer than 100 tokens" in report.to_text()


def test_the_same_bytes_under_two_names_are_duplicates(tmp_path):
    same, other = make_image(seed=1), make_image(seed=2)
    roots = make_folder(tmp_path, {"a/1.png": same, "b/1.png": same, "c/1.png": other})
    samples = [make_sample(name, f"{name}/1.png") for name in "abc"]
    report = check(samples, roots, full=True)
    assert report.duplicates == (("a/1.png", "b/1.png"),)
    assert report.ok
    assert "a/1.png = b/1.png" in report.to_text()
    assert check(samples, roots).duplicates is None


def test_an_image_of_many_samples_and_sets_is_read_once(tmp_path):
    roots = make_folder(tmp_path, {"1.png": make_image()})
    samples = [make_sample("a", "1.png"), make_sample("b", "1.png", "1.png")]
    progress = []
    report = check_data(
        {
            "pretrain": CheckedSet(SampleSet.of("pretrain", samples), 100, lambda position, plans: 10),
            "finetune": CheckedSet(SampleSet.of("finetune", samples[:1]), 100, lambda position, plans: 10),
        },
        roots=roots,
        pixels=PixelSettings(),
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert progress == [(1, 1)]
    assert [one.sub_images for one in report.sets] == [{1: 1}, {1: 1}]


@pytest.mark.parametrize(
    ("name", "source", "origin"),
    [
        ("coco/train2017/000000033471.jpg", "coco/train2017", "train2017.zip"),
        ("gqa/images/2354786.jpg", "gqa/images", "gqa/images.zip"),
        ("ocr_vqa/images/1437717772.jpg", "ocr_vqa/images", "download script"),
        ("textvqa/train_images/a.jpg", "textvqa/train_images", "train_val_images.zip"),
        ("vg/VG_100K/1.jpg", "vg/VG_100K", "part 1"),
        ("vg/VG_100K_2/1.jpg", "vg/VG_100K_2", "part 2"),
        ("s3://bucket/data/vg/VG_100K_2/1.jpg", "vg/VG_100K_2", "part 2"),
        ("GCC_train_002582585.jpg", "CC-595K", "LLaVA-CC3M-Pretrain-595K"),
        ("00453/004539375.jpg", "LCS-558K", "LLaVA-Pretrain"),
        ("mine/a/1.jpg", "mine", ""),
        ("/data/mine/1.jpg", "/data/mine", ""),
        ("1.jpg", "(no folder)", ""),
    ],
)
def test_images_are_told_apart_by_source(name, source, origin):
    found = find_source(name)
    assert found.name == source
    assert origin in found.origin


def test_missing_images_of_a_known_source_come_with_advice(tmp_path):
    roots = make_folder(
        tmp_path, {"ocr_vqa/images/2.gif": make_image(image_format="GIF"), "vg/VG_100K/1.jpg": make_image()}
    )
    names = ["ocr_vqa/images/1.jpg", "ocr_vqa/images/2.jpg", "vg/VG_100K/1.jpg", "vg/VG_100K_2/1.jpg", "mine/1.jpg"]
    report = check([make_sample(name, name) for name in names], roots)
    advice = {source.source.name: source.advice for source in report.sets[0].sources}
    assert advice["vg/VG_100K"] == ""
    assert "1 of 1 images of vg/VG_100K_2 are missing. Get them from Visual Genome part 2" in advice["vg/VG_100K_2"]
    assert advice["mine"] == "1 of 1 images of mine are missing."
    ocr = advice["ocr_vqa/images"]
    assert "2 of 2 images" in ocr
    assert "355" in ocr
    assert "1 of them exist with another suffix (ocr_vqa/images/2.gif instead of ocr_vqa/images/2.jpg)" in ocr
    assert ocr in report.to_text()


def test_the_report_is_json_and_names_everything(tmp_path):
    samples = [make_sample(f"s{n}", f"mine/{n}.jpg") for n in range(10)]
    content = json.loads(json.dumps(check(samples, {"": str(tmp_path)}).to_dict()))
    assert content["ok"] is False
    (source,) = content["sets"][0]["sources"]
    assert source["bad"] == {"missing": 10}
    assert [shown["name"] for shown in source["bad_images"]] == [f"mine/{n}.jpg" for n in range(10)]
