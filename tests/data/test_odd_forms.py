"""Odd records and damaged files of every form: a record is a sample or a problem; a file is read or refused in a sentence."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_forms import IMAGE, MESSAGES, PAIRS, TURNS, hub_image, make_scenes, parquet_bytes, png, tar_bytes, write_form
from hypothesis import given, settings
from hypothesis import strategies as st

from meteor.data.inspect_image import inspect_image
from meteor.data.sample_sets import load_set
from meteor.errors import DataError, MeteorError
from meteor.image.pixels import PixelSettings

TEXTS = [
    "",
    "\0",
    "\ud83d",
    "<image>",
    "<image>" * 3,
    "../x",
    "data:",
    "data:image/png;base64,",
    "data:,x",
    "http://a",
    "é",
]
SCALARS = st.none() | st.booleans() | st.sampled_from([0, -1, 10**400, float("nan")]) | st.sampled_from(TEXTS)
PARTS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["text", "image", "image_url", "video", None, 3]),
        "text": SCALARS,
        "image": SCALARS | st.fixed_dictionaries({}, optional={"bytes": SCALARS, "path": SCALARS}),
        "image_url": SCALARS | st.fixed_dictionaries({"url": SCALARS}),
        "index": st.sampled_from([0, -1, 7, True, "x", None]),
    },
)
MESSAGE_LISTS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "system", "tool", None, 1]),
            "content": SCALARS | st.lists(PARTS | SCALARS, max_size=3),
        },
    )
    | SCALARS,
    max_size=4,
)
PAIR_LISTS = st.lists(st.fixed_dictionaries({}, optional={"user": SCALARS, "assistant": SCALARS}) | SCALARS, max_size=2)
IMAGE_FIELDS = SCALARS | st.lists(SCALARS | st.fixed_dictionaries({"bytes": SCALARS, "path": SCALARS}), max_size=3)
RECORDS = st.fixed_dictionaries(
    {}, optional={"id": SCALARS, "images": IMAGE_FIELDS, "messages": MESSAGE_LISTS | SCALARS, "texts": PAIR_LISTS}
)
GOOD = {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that."}]}


def check(uri, folder):
    """Load a set and look at all its images; every record is a sample or a problem, and every image good or with a reason."""
    found = load_set(str(uri), name="odd", folder=str(folder))
    assert all(problem.reason and problem.message for problem in found.problems)
    ids = [*found.ids.to_pylist(), *(problem.sample_id for problem in found.problems)]
    assert len(set(ids)) == len(ids)
    roots = {"": str(folder), **found.inside_root}
    reasons = []
    for name in found.distinct_images.to_pylist():
        for full in (True, False):
            image = inspect_image(name, roots, PixelSettings(), full=full)
            assert (image.plan is None) == bool(image.reason) == bool(image.message)
        reasons.append(image.reason)
    return found, reasons


@settings(max_examples=40)
@given(odd=st.lists(RECORDS, max_size=3), name=st.sampled_from(["s.json", "s.jsonl", "s.tar"]))
def test_every_odd_record_is_a_sample_or_a_problem(tmp_path_factory, odd, name):
    folder = tmp_path_factory.mktemp("odd")
    texts = [json.dumps(record) for record in [GOOD, *odd, GOOD]]
    content = {
        "s.json": f"[{','.join(texts)}]".encode(),
        "s.jsonl": "\n".join(texts).encode(),
        "s.tar": tar_bytes([(f"{i}.json", text.encode()) for i, text in enumerate(texts)]),
    }
    (folder / name).write_bytes(content[name])
    found, _ = check(folder / name, folder)
    assert len(found) + len(found.problems) == len(odd) + 2
    assert len(found) >= 2


ARROW_TEXTS = st.sampled_from([None, "", "<image>", "what?", "data:image/png;base64,!", "é"])
ARROW_IMAGES = st.sampled_from(
    [
        None,
        hub_image(None),
        hub_image(b""),
        hub_image(b"text"),
        hub_image(png(1)),
        hub_image(png(1)[:99]),
        hub_image(None, "x.png"),
    ]
)
ROWS = {
    "image": (IMAGE, ARROW_IMAGES),
    "images": (pa.list_(IMAGE), st.none() | st.lists(ARROW_IMAGES, max_size=3)),
    "conversations": (
        TURNS,
        st.none()
        | st.lists(
            st.none()
            | st.fixed_dictionaries({"from": st.sampled_from([None, "human", "gpt", "tool"]), "value": ARROW_TEXTS}),
            max_size=3,
        ),
    ),
    "texts": (
        PAIRS,
        st.none()
        | st.lists(st.none() | st.fixed_dictionaries({"user": ARROW_TEXTS, "assistant": ARROW_TEXTS}), max_size=2),
    ),
    "messages": (
        MESSAGES,
        st.none()
        | st.lists(
            st.fixed_dictionaries(
                {
                    "role": st.sampled_from([None, "user", "assistant", "system"]),
                    "content": st.none()
                    | st.lists(
                        st.none()
                        | st.fixed_dictionaries(
                            {
                                "type": st.sampled_from([None, "text", "image"]),
                                "text": ARROW_TEXTS,
                                "image": ARROW_IMAGES,
                            }
                        ),
                        max_size=3,
                    ),
                }
            ),
            max_size=3,
        ),
    ),
    # Columns of other types than they should be.
    "id": (pa.list_(pa.int64()), st.none() | st.lists(st.integers(0, 3), max_size=1)),
    "type": (pa.float64(), st.none() | st.floats()),
}
OTHER_TYPES = {
    "image": pa.int64(),
    "images": pa.list_(pa.list_(pa.string())),
    "texts": pa.string(),
    "messages": pa.binary(),
}


@settings(max_examples=50)
@given(data=st.data(), rows_per_group=st.integers(1, 3))
def test_every_odd_row_is_a_sample_or_a_problem(tmp_path_factory, data, rows_per_group):
    folder = tmp_path_factory.mktemp("odd")
    dialogue = data.draw(st.sampled_from(["conversations", "texts", "messages"]))
    names = [dialogue, *data.draw(st.lists(st.sampled_from(sorted(ROWS)), unique=True, max_size=3))]
    num_rows = data.draw(st.integers(0, 4))
    columns = {}
    for name in dict.fromkeys(names):
        kind, values = ROWS[name]
        if name in OTHER_TYPES and data.draw(st.integers(0, 5)) == 0:
            columns[name] = pa.nulls(num_rows, OTHER_TYPES[name])
        else:
            columns[name] = pa.array([data.draw(values) for _ in range(num_rows)], kind)
    (folder / "s.parquet").write_bytes(parquet_bytes(pa.table(columns), rows_per_group))
    found, _ = check(folder / "s.parquet", folder)
    assert len(found) + len(found.problems) == num_rows


@pytest.mark.parametrize("column", sorted(OTHER_TYPES))
def test_a_column_of_another_type_makes_its_rows_problems(tmp_path, column):
    values = {
        "image": pa.array([1, 2]),
        "images": pa.array([[["a.png"]], [["b.png"]]]),
        "texts": pa.array(["a", "b"]),
        "messages": pa.array([b"a", b"b"]),
    }
    texts = [[{"user": "what?", "assistant": "that."}]] * 2
    table = {"texts": pa.array(texts, PAIRS)} | {column: values[column]}
    (tmp_path / "s.parquet").write_bytes(parquet_bytes(pa.table(table)))
    found, _ = check(tmp_path / "s.parquet", tmp_path)
    assert (len(found), len(found.problems)) == (0, 2)


def test_a_bad_image_inside_a_file_has_the_reason_of_an_image_file(tmp_path):
    texts = pa.array([[{"user": "what?", "assistant": "that."}]] * 5, PAIRS)
    bad = [hub_image(b""), hub_image(b"<html>"), hub_image(png(1)[:-500]), hub_image(png(2)), hub_image(None)]
    table = pa.table({"images": pa.array([[image] for image in bad], pa.list_(IMAGE)), "texts": texts})
    (tmp_path / "s.parquet").write_bytes(parquet_bytes(table))
    (tmp_path / "s.jsonl").write_text(json.dumps({"image": "data:image/png;base64,A", "texts": texts[0].as_py()}))
    assert check(tmp_path / "s.jsonl", tmp_path)[1] == ["unreadable"]
    found, _ = check(tmp_path / "s.parquet", tmp_path)
    names = found.distinct_images.to_pylist()
    reasons = [inspect_image(name, found.inside_root, PixelSettings(), full=True).reason for name in names]
    assert reasons == ["empty", "not_an_image", "truncated", "", "empty"]


@pytest.mark.parametrize("kind", [IMAGE, pa.binary()], ids=["struct", "binary"])
def test_images_in_a_column_that_is_not_read_are_a_problem_and_no_text(tmp_path, kind):
    texts = pa.array([[{"user": "what?", "assistant": "that."}]] * 3, PAIRS)
    image = hub_image(png(0)) if kind == IMAGE else png(0)
    table = pa.table({"image_0": pa.array([image, None, image], kind), "texts": texts})
    (tmp_path / "s.parquet").write_bytes(parquet_bytes(table, rows_per_group=1))
    found, _ = check(tmp_path / "s.parquet", tmp_path)
    assert found.ids.to_pylist() == ["1"]
    assert [problem.reason for problem in found.problems] == ["bad_image_field"] * 2
    assert "'image_0' is not read: name images under 'image'" in found.problems[0].message


def test_text_that_is_no_utf8_costs_one_row(tmp_path):
    texts = pa.array([[{"user": "what?", "assistant": "that."}]] * 3, PAIRS)
    spoilt = pa.array([b"a", b"\xff\xfe", b"c"]).view(pa.string())
    (tmp_path / "s.parquet").write_bytes(parquet_bytes(pa.table({"id": spoilt, "texts": texts})))
    found, _ = check(tmp_path / "s.parquet", tmp_path)
    assert (found.ids.to_pylist(), [problem.reason for problem in found.problems]) == (["a", "c"], ["bad_record"])


def test_a_damaged_row_group_costs_its_own_rows(tmp_path):
    table = pa.table(
        {"texts": pa.array([[{"user": f"what {i}?" * 50, "assistant": "that."}] for i in range(9)], PAIRS)}
    )
    path = tmp_path / "s.parquet"
    path.write_bytes(parquet_bytes(table))
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    whole, end = path.read_bytes(), chunk.dictionary_page_offset + chunk.total_compressed_size
    path.write_bytes(whole[: end - 60] + bytes(60) + whole[end:])
    found, _ = check(tmp_path / "s.parquet", tmp_path)
    assert len(found) + len(found.problems) == 9
    assert {problem.sample_id for problem in found.problems} == {"3", "4", "5"}
    assert all("damaged" in problem.message for problem in found.problems)


@pytest.mark.parametrize("form", ["cauldron.parquet", "parts.parquet", "shards.tar", "openai.jsonl"])
def test_a_spoilt_file_is_read_or_refused_in_one_sentence(tmp_path, form):
    rng = random.Random(form)
    write_form(form, str(tmp_path), make_scenes(6))
    path = tmp_path / form
    whole = path.read_bytes()
    refusals = []
    for number in range(40):
        place, length = rng.randrange(len(whole)), rng.randrange(1, 40)
        spoilt = [
            whole[:place],
            whole[:place] + rng.randbytes(length) + whole[place + length :],
            whole[:place] + rng.randbytes(length) + whole[place:],
            whole[:place] + whole[place + length :],
            whole + whole,
            b"",
            rng.randbytes(3000),
        ]
        path.write_bytes(rng.choice(spoilt))
        try:
            check(path, tmp_path / str(number))
        except DataError as error:
            refusals.append(str(error))
    assert refusals
    assert all(str(path) in message and len(message) < 700 for message in refusals)


@pytest.mark.parametrize("part", [0.3, 0.6, 0.95, "whole members"])
def test_an_archive_that_is_cut_short_is_one_line(tmp_path, part):
    uri = write_form("shards.tar", str(tmp_path), make_scenes(8))
    path = tmp_path / "shards.tar"
    whole = path.read_bytes()
    # The end of an archive is two blocks of zeros, which writers fill up to 10,240 bytes.
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    path.write_bytes(whole[:end] if part == "whole members" else whole[: int(end * part)])
    found, reasons = check(uri, tmp_path)
    assert "cut short" in found.problems[-1].message
    assert found.problems[-1].sample_id == "end"
    assert 0 < len(found) <= 8
    assert set(reasons) == {""}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.csv", b"a,b", "no known form: give LLaVA's or chat messages as .json or .jsonl, .parquet"),
        ("s.parquet", b"PAR1", "no Parquet file, or damaged"),
        ("s.tar", b"\x1f\x8b" + bytes(600), "no tar archive"),
        (
            "s.parquet",
            parquet_bytes(pa.table({"a": [1]})),
            "has the columns a, and none of conversations, messages, texts",
        ),
    ],
)
def test_a_file_of_an_unknown_form_is_refused_with_the_known_ones(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MeteorError, match=message):
        check(tmp_path / name, tmp_path)
