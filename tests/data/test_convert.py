"""Conversion to LLaVA's JSON keeps samples and images, whatever the form, and goes on after a stop."""

import hashlib
import json

import pyarrow as pa
import pytest
from data_forms import FORMS, FORMS_OF_ONE_IMAGE, IMAGE, PAIRS, hub_image, make_scenes, parquet_bytes, png, write_form

from meteor import storage
from meteor.cli.main import main
from meteor.data import convert as module
from meteor.data.convert import convert
from meteor.data.data_files import find_data_files
from meteor.data.roots import resolve_image
from meteor.data.samples import load_samples, samples_in
from meteor.image.decode import image_suffix
from meteor.image.files import read_image_file


def contents(samples, roots):
    def key(name):
        return hashlib.sha256(read_image_file(resolve_image(name, roots))).hexdigest()

    return [(one.id, one.turns, one.system, one.type, [key(name) for name in one.images]) for one in samples]


def check(uri, folder, target):
    done = convert(uri, target)
    samples, problems = load_samples(done.uri)
    assert problems == []
    files = find_data_files(uri)
    images = storage.join(folder, "images")
    given = contents(samples_in(files, "@/"), {"": images, "@/": files.root})
    assert contents(samples, {"": images} if is_outside(samples, images) else {"": done.images}) == given
    assert done.num_samples == len(samples)
    return done, samples


def is_outside(samples, images):
    return any(storage.exists(storage.join(images, name)) for sample in samples for name in sample.images)


@pytest.mark.parametrize("form", [*FORMS, *FORMS_OF_ONE_IMAGE])
def test_the_samples_of_every_form_are_kept(tmp_path, form):
    scenes = make_scenes(7, is_single=form in FORMS_OF_ONE_IMAGE)
    uri = write_form(form, str(tmp_path / "given"), scenes, num_shards=2)
    _, samples = check(uri, str(tmp_path / "given"), str(tmp_path / "target"))
    assert [sample.id for sample in samples] == [name for name, _, _ in scenes]
    # Nothing but the result is left.
    assert {path.name for path in (tmp_path / "target").iterdir()} <= {"samples.json", "images"}


@pytest.mark.parametrize("form", ["openai.jsonl", "cauldron.parquet", "shards.tar"])
def test_conversion_reads_and_writes_object_stores(s3_root, form):
    uri = write_form(form, f"{s3_root}/given", make_scenes(5), num_shards=2)
    check(uri, f"{s3_root}/given", f"{s3_root}/target")


def test_images_are_named_by_content_and_written_once(tmp_path, monkeypatch):
    scenes = [(f"s{i}", [png(i % 2, image_format="JPEG")], [("what?", "that.")]) for i in range(6)]
    uri = write_form("cauldron.parquet", str(tmp_path / "given"), scenes, num_shards=2)
    written = []
    real = storage.write_bytes
    monkeypatch.setattr(storage, "write_bytes", lambda uri, data: written.append(uri) or real(uri, data))
    done = convert(uri, str(tmp_path / "target"))
    expected = {hashlib.sha256(images[0]).hexdigest() for _, images, _ in scenes}
    files = [uri for uri in written if uri.endswith(".jpg")]
    assert sorted(file.rpartition("/")[2] for file in files) == sorted(f"{digest}.jpg" for digest in expected)
    assert (done.num_images, done.num_kept) == (6, 0)
    written.clear()
    convert(uri, str(tmp_path / "target"))
    assert not any(uri.endswith(".jpg") for uri in written)


def test_a_conversion_that_stops_goes_on_behind_the_last_file_and_shows_no_half_result(tmp_path, monkeypatch):
    uri = write_form("shards.tar", str(tmp_path / "given"), make_scenes(9), num_shards=3)
    target = tmp_path / "target"
    real, num_parts = module._write_part, 0

    def stop(*given):
        nonlocal num_parts
        num_parts += 1
        if num_parts == 3:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patched:
        patched.setattr(module, "_write_part", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(uri, str(target))
    assert not (target / "samples.json").exists()
    done, samples = check(uri, str(tmp_path / "given"), str(target))
    assert (done.num_kept, len(samples)) == (2, 9)


def test_records_that_cannot_be_converted_are_listed(tmp_path, capsys):
    images = [[hub_image(png(0))], [hub_image(b"")], [hub_image(None)], [], [hub_image(b"BMx")]]
    texts = [[{"user": "what?", "assistant": "that."}]] * 3 + [None] + [[{"user": "what?", "assistant": "that."}]]
    table = pa.table({"images": pa.array(images, pa.list_(IMAGE)), "texts": pa.array(texts, PAIRS)})
    (tmp_path / "s.parquet").write_bytes(parquet_bytes(table))
    assert main(["data", "convert", str(tmp_path / "s.parquet"), "--to", str(tmp_path / "target")]) == 1
    shown = capsys.readouterr().out
    assert "2 samples, with 2 images" in shown
    assert "empty: 2 samples: 1, 2" in shown
    assert "empty_conversation: 1 samples: 3" in shown
    assert main(["data", "convert", str(tmp_path / "s.parquet"), "--to", str(tmp_path / "target"), "--json"]) == 1
    assert [one["sample_id"] for one in json.loads(capsys.readouterr().out)["problems"]] == ["1", "2", "3"]


def test_a_form_that_is_not_known_is_an_error_in_one_line(tmp_path, capsys):
    (tmp_path / "s.csv").write_text("a,b")
    assert main(["data", "convert", str(tmp_path / "s.csv"), "--to", str(tmp_path / "target")]) == 2
    assert "has no known form: give LLaVA's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("image_format", "suffix"),
    [
        ("PNG", ".png"),
        ("JPEG", ".jpg"),
        ("GIF", ".gif"),
        ("WEBP", ".webp"),
        ("BMP", ".bmp"),
        ("TIFF", ".tif"),
        ("AVIF", ".avif"),
        ("JPEG2000", ".jp2"),
    ],
)
def test_files_get_the_usual_ending_of_their_format(image_format, suffix):
    assert image_suffix(png(0, image_format=image_format)) == suffix
    assert image_suffix(b"text") == ".img"
