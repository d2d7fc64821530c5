"""Equal samples in every form give equal samples, image keys and tokens."""

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_forms import (
    FORMS,
    FORMS_OF_ONE_IMAGE,
    IMAGE,
    PAIRS,
    hub_image,
    make_scenes,
    parquet_bytes,
    png,
    tar_bytes,
    write_form,
)

from meteor import storage
from meteor.data.digests import file_digest
from meteor.data.roots import resolve_image
from meteor.data.sample_sets import load_set
from meteor.data.token_table import tokenise_set
from meteor.image.files import read_image_file
from meteor.image.parquet_cells import open_parquet
from meteor.text.tokenizer import load_tokenizer


def load(uri, folder):
    return load_set(uri, name="a", folder=storage.join(folder, "kept"))


def contents(found, folder):
    """Id, turns, and keys of the images of each sample."""
    roots = {"": storage.join(folder, "images"), **found.inside_root}

    def key(name):
        return hashlib.sha256(read_image_file(resolve_image(name, roots))).hexdigest()

    return [(sample.id, sample.turns, sample.system, [key(name) for name in sample.images]) for sample in found]


def expected_keys(scenes):
    return [[hashlib.sha256(image).hexdigest() for image in images] for _, images, _ in scenes]


@pytest.mark.parametrize(
    ("form", "num_shards"),
    [*((form, 1) for form in (*FORMS[1:], *FORMS_OF_ONE_IMAGE)), ("parts.parquet", 3), ("shards.tar", 3)],
)
def test_every_form_gives_the_samples_of_llavas_json(tmp_path, tokenizer_folder, form, num_shards):
    scenes = make_scenes(10, is_single=form in FORMS_OF_ONE_IMAGE)
    folder, plain = str(tmp_path / "form"), str(tmp_path / "llava")
    reference = load(write_form("llava.json", plain, scenes), plain)
    found = load(write_form(form, folder, scenes, num_shards=num_shards), folder)
    assert found.problems == []
    assert contents(found, folder) == contents(reference, plain)
    assert [keys for *_, keys in contents(found, folder)] == expected_keys(scenes)
    tokenizer = load_tokenizer(tokenizer_folder)
    tokens, expected = (tokenise_set(samples, tokenizer, "vicuna_v1") for samples in (found, reference))
    assert [tokens.row(i) for i in range(10)] == [expected.row(i) for i in range(10)]
    # A second reading finds what the first one stored.
    assert list(load(found.uri, folder)) == list(found)


@pytest.mark.parametrize("form", ["openai.jsonl", "cauldron.parquet", "shards.tar"])
def test_all_forms_live_on_s3_too(s3_root, form):
    scenes = make_scenes(9)
    found = load(write_form(form, s3_root, scenes, num_shards=2), s3_root)
    assert [keys for *_, keys in contents(found, s3_root)] == expected_keys(scenes)


@pytest.mark.parametrize("form", ["openai.jsonl", "cauldron.parquet", "shards.tar"])
def test_files_that_move_keep_their_digest_and_their_names(tmp_path, form):
    first, second = ((load(write_form(form, str(tmp_path / name), make_scenes(5)), str(tmp_path))) for name in "ab")
    assert first.digest == second.digest
    assert list(first) == list(second)
    assert first.root != second.root


def test_a_changed_text_or_path_changes_the_digest(tmp_path):
    def digest(answer="a cat.", path="2.png"):
        images = [[hub_image(png(1), "1.png")], [hub_image(None, path)], [hub_image(png(1), "3.png")]]
        texts = [[{"user": "what?", "assistant": text}] for text in ("a bat.", answer, "a rat.")]
        table = pa.table({"images": pa.array(images, pa.list_(IMAGE)), "texts": pa.array(texts, PAIRS)})
        # Without statistics, which would show most changes in the footer.
        pq.write_table(table, tmp_path / "s.parquet", write_statistics=False)
        return file_digest(str(tmp_path / "s.parquet"), ".parquet")

    assert digest() == digest()
    assert len({digest(), digest(answer="a cow."), digest(path="9.png")}) == 3


def test_text_is_read_without_the_bytes_of_images(tmp_path, monkeypatch):
    uri = write_form("cauldron.parquet", str(tmp_path), make_scenes(12))
    read = set()
    real = type(open_parquet(uri)).iter_batches

    def iter_batches(self, *given, columns, **options):
        read.update(columns)
        return real(self, *given, columns=columns, **options)

    monkeypatch.setattr(type(open_parquet(uri)), "iter_batches", iter_batches)
    assert len(load(uri, str(tmp_path))) == 12
    assert "images.list.element.path" in read
    assert not any("bytes" in path for path in read)


def test_images_with_a_path_alone_are_files_below_the_roots(tmp_path):
    images = [
        [{"bytes": png(1), "path": "in.png"}, {"bytes": None, "path": "out.png"}],
        [{"bytes": None, "path": None}],
    ]
    texts = [[{"user": "what?", "assistant": "that."}]] * 2
    table = pa.table({"images": pa.array(images, pa.list_(IMAGE)), "texts": pa.array(texts, PAIRS)})
    (tmp_path / "s.parquet").write_bytes(parquet_bytes(table))
    found = load(str(tmp_path / "s.parquet"), str(tmp_path))
    prefix = f"@{found.digest[:16]}/"
    assert found.images.to_pylist() == [
        [f"{prefix}#000000000/images/0", "out.png"],
        [f"{prefix}#000000001/images/0"],
    ]
    # Without any bytes in the file, all are files.
    (tmp_path / "paths.parquet").write_bytes(
        parquet_bytes(pa.table({"image": ["a.png", "b.png"], "texts": pa.array(texts, PAIRS)}))
    )
    assert load(str(tmp_path / "paths.parquet"), str(tmp_path)).images.to_pylist() == [["a.png"], ["b.png"]]


def test_rows_without_an_id_are_named_after_their_file_and_row(tmp_path):
    (tmp_path / "data").mkdir()
    for number in range(2):
        texts = pa.array([[{"user": f"what {row}?", "assistant": "that."}] for row in range(2)], PAIRS)
        (tmp_path / f"data/train-{number}.parquet").write_bytes(parquet_bytes(pa.table({"texts": texts})))
    assert load(str(tmp_path / "data"), str(tmp_path)).ids.to_pylist() == [
        "train-0/0",
        "train-0/1",
        "train-1/0",
        "train-1/1",
    ]
    assert load(str(tmp_path / "data/train-1.parquet"), str(tmp_path)).ids.to_pylist() == ["0", "1"]


def test_captions_and_names_in_archives(tmp_path):
    question = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that."}]
    swapped = [{"from": "human", "value": "<image><image>which?"}, {"from": "gpt", "value": "both."}]
    members = [
        ("a/0001.jpg", png(1)),
        ("a/0001.txt", b" a red cat \n"),
        ("a/0001.json", json.dumps({"url": "https://example.org/1.jpg", "caption": "a red cat"}).encode()),
        ("0002.jpg", png(2)),
        ("0002.json", json.dumps({"id": "x", "image": "coco/7.jpg", "conversations": question}).encode()),
        ("0003.l.png", png(3)),
        ("0003.r.png", png(4)),
        ("0003.json", json.dumps({"image": ["r.png", "l.png"], "conversations": swapped}).encode()),
        ("0004.json", json.dumps({"image": "elsewhere.png", "conversations": question}).encode()),
        ("readme.md", b"no sample"),
        ("0005.png", png(5)),
        ("0005.json", json.dumps(question).encode()),
    ]
    (tmp_path / "s.tar").write_bytes(tar_bytes(members))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/elsewhere.png").write_bytes(png(9))
    found = load(str(tmp_path / "s.tar"), str(tmp_path))
    assert found.problems == []
    assert [(one, len(keys)) for one, *_, keys in contents(found, str(tmp_path))] == [
        ("a/0001", 1),
        ("x", 1),
        ("0003", 2),
        ("0004", 1),
        ("0005", 1),
    ]
    assert next(iter(found)).turns[1].text == "a red cat"
    keys = {one: keys for one, *_, keys in contents(found, str(tmp_path))}
    assert keys["0003"] == [hashlib.sha256(png(seed)).hexdigest() for seed in (4, 3)]
    assert keys["0004"] == [hashlib.sha256(png(9)).hexdigest()]


IMAGE_PART, TEXT_PART = {"type": "image"}, {"type": "text", "text": "what?"}
ANSWER = {"role": "assistant", "content": "that."}


@pytest.mark.parametrize(
    ("record", "images", "texts"),
    [
        (
            {"messages": [{"role": "system", "content": "be brief."}, {"role": "user", "content": "what?"}, ANSWER]},
            [],
            [],
        ),
        # TRL shows images before the first question if the messages are text alone.
        ({"images": ["1.png"], "messages": [{"role": "user", "content": "what?"}, ANSWER]}, ["1.png"], []),
        ({"images": ["1.png"], "messages": [{"role": "user", "content": "<image>what?"}, ANSWER]}, ["1.png"], []),
        (
            {
                "images": ["1.png", "2.png"],
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image", "index": 1}, {"type": "image", "index": 0}, TEXT_PART],
                    },
                    ANSWER,
                ],
            },
            ["2.png", "1.png"],
            [],
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "a "},
                            {"type": "image_url", "image_url": {"url": "file:///d/a%20b.png", "detail": "low"}},
                            {"type": "text", "text": "b", "image": None},
                        ],
                    },
                    ANSWER,
                ]
            },
            ["/d/a b.png"],
            ["a b"],
        ),
    ],
)
def test_messages_as_people_write_them(tmp_path, record, images, texts):
    (tmp_path / "s.jsonl").write_text(json.dumps(record))
    found = load(str(tmp_path / "s.jsonl"), str(tmp_path))
    assert found.problems == []
    (sample,) = found
    assert list(sample.images) == images
    assert sample.turns[0].text == (texts or ["what?"])[0]
    assert sample.system == ("be brief." if "system" in json.dumps(record) else None)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [{"role": "user", "content": [IMAGE_PART, TEXT_PART]}, ANSWER]}, "part_without_image"),
        (
            {"images": ["1.png", "2.png"], "messages": [{"role": "user", "content": [IMAGE_PART, TEXT_PART]}, ANSWER]},
            "image_without_placeholder",
        ),
        ({"messages": [{"role": "tool", "content": "x"}, ANSWER]}, "unknown_speaker"),
        ({"messages": [ANSWER]}, "turn_order"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no_answer"),
        ({"messages": [{"role": "user", "content": None}, ANSWER]}, "bad_turn"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "x"}]}, ANSWER]}, "bad_part"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": 7}]}, ANSWER]}, "bad_image_field"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "https://a.b/c.png"}]}, ANSWER]},
            "bad_image_field",
        ),
        (
            {
                "images": ["1.png"],
                "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": [IMAGE_PART]}],
            },
            "misplaced_placeholder",
        ),
        ({"messages": [ANSWER], "texts": [{"user": "a", "assistant": "b"}]}, "two_dialogues"),
        ({"texts": [{"user": "a", "assistant": None}]}, "bad_turn"),
        ({"texts": [{"user": "<image> a", "assistant": "b"}]}, "placeholder_without_image"),
    ],
)
def test_a_record_that_cannot_be_used_has_a_reason(tmp_path, record, reason):
    (tmp_path / "s.jsonl").write_text(json.dumps(record))
    found = load(str(tmp_path / "s.jsonl"), str(tmp_path))
    assert [problem.reason for problem in found.problems] == [reason]
    assert len(found) == 0


def test_files_that_the_hubs_library_writes_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    image, text = datasets.Image(), datasets.Value("string")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/out.png").write_bytes(png(3))
    part = {"type": text, "text": text, "image": image}
    features = datasets.Features(
        {
            "images": datasets.List(image),
            "messages": datasets.List({"role": text, "content": datasets.List(part)}),
        }
    )
    user = [{"type": "image", "image": hub_image(png(0))}, {"type": "image"}, TEXT_PART]
    filled = [dict.fromkeys(part) | one for one in user]
    answer = [dict.fromkeys(part) | {"type": "text", "text": "that."}]
    messages = [{"role": "user", "content": filled}, {"role": "assistant", "content": answer}]
    rows = {"images": [[hub_image(png(1))], [str(tmp_path / "images/out.png")]], "messages": [messages] * 2}
    table = datasets.Dataset.from_dict(rows, features=features)
    # With the images of other files inside, as the library uploads them, and without.
    table.to_parquet(str(tmp_path / "in.parquet"))
    (tmp_path / "out.parquet").write_bytes(parquet_bytes(table.data.table))
    for name in ("in", "out"):
        found = load(str(tmp_path / f"{name}.parquet"), str(tmp_path))
        assert found.problems == []
        keys = [keys for *_, keys in contents(found, str(tmp_path))]
        assert keys == [[hashlib.sha256(png(seed)).hexdigest() for seed in seeds] for seeds in ((0, 1), (0, 3))]
