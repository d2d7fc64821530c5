"""Every record of an annotation file becomes a sample or a problem, or one sentence says what is wrong with the file."""

import gzip
import json
import os
import random
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meteor.data import sample_sets, samples, token_table
from meteor.data.bulk import by_halves, map_in_processes
from meteor.data.sample_sets import SampleSet, load_set
from meteor.data.samples import Sample, load_samples
from meteor.data.token_table import tokenise_set
from meteor.errors import DataError, SettingsError
from meteor.text.conversation import Turn
from meteor.text.tokenizer import load_tokenizer

TEXTS = [
    "",
    " ",
    "\0",
    "\ud83d",
    "\u202e",
    "\ufeff",
    "\r\n",
    "</s>",
    "<image>",
    "<image>" * 40_000,
    "../x",
    "s3://b/x",
    "é" * 300,
]
NUMBERS = [0, -1, 1.5, 10**400, float("nan"), float("inf")]
SCALARS = st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["from", "value", "a"]), inner, max_size=3)
    ),
    max_leaves=5,
) | st.just(["1.jpg"] * 40_000)
TURNS = st.lists(
    st.fixed_dictionaries({}, optional={"from": st.sampled_from(["human", "gpt", "system", 1]), "value": SCALARS})
    | VALUES,
    max_size=4,
)
FIELDS = ["id", "image", "images", "image_path", "type", "category", "video", "\ud83d"]
RECORDS = VALUES | st.fixed_dictionaries({"conversations": TURNS | VALUES}, optional=dict.fromkeys(FIELDS, VALUES))


def good(number):
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a cat."}]
    return {"id": f"good{number}", "conversations": turns}


def write(folder, records, name):
    lines = [json.dumps(record) for record in records]
    (folder / name).write_text(f"[{','.join(lines)}]" if name.endswith(".json") else "\n".join(lines) + "\n")
    return folder / name


def make_sample(name, text="what?"):
    return Sample(name, (), (Turn("human", text), Turn("gpt", "a cat.")))


@settings(max_examples=60)
@given(
    odd=st.lists(RECORDS, max_size=3),
    name=st.sampled_from(["s.json", "s.jsonl"]),
    template=st.sampled_from(["plain", "vicuna_v1"]),
)
def test_every_record_is_a_sample_or_a_problem(tmp_path_factory, tokenizer_folder, odd, name, template):
    folder = tmp_path_factory.mktemp("odd")
    path = write(folder, [good(0), *odd, good(1)], name)
    tokenizer = load_tokenizer(tokenizer_folder)
    found = load_set(str(path), name="odd", folder=str(folder / "kept"))
    assert len(found) + len(found.problems) == len(odd) + 2
    assert {"good0", "good1"} <= set(found.ids.to_pylist())
    assert all(problem.reason and problem.message for problem in found.problems)
    ids = [*found.ids.to_pylist(), *(problem.sample_id for problem in found.problems)]
    assert len(set(ids)) == len(ids)
    in_memory = load_samples(str(path))
    assert [sample.id for sample in in_memory[0]] == found.ids.to_pylist()
    lengths = tokenise_set(found, tokenizer, template, folder=str(folder / "kept")).lengths
    assert len(lengths.num_text_tokens) == len(found)


def spoil(whole, rng):
    """Change a file as transfers, editors and other programs do."""
    place = rng.randrange(len(whole))
    return rng.choice(
        [
            whole[:place],
            whole[:place] + bytes([rng.randrange(256)]) + whole[place + 1 :],
            whole[:place] + bytes(rng.randrange(1, 9)) + whole[place:],
            b"\xef\xbb\xbf" + whole.replace(b"\n", b"\r\n\r\n"),
            whole.decode().encode(rng.choice(["utf-16", "utf-32", "utf-16-be"])),
            gzip.compress(whole),
            b"",
            b"\n \n",
            b"null",
            whole + whole,
            whole.replace(b'"id"', b'"id": 1, "id"'),
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        ]
    )


@pytest.mark.parametrize("name", ["s.json", "s.jsonl"])
def test_a_damaged_file_is_read_or_refused_in_one_sentence_that_names_it(tmp_path, name):
    rng = random.Random(name)
    refusals = []
    for number in range(150):
        path = write(tmp_path, [good(i) for i in range(4)], name)
        path.write_bytes(spoil(path.read_bytes(), rng))
        try:
            found = load_set(str(path), name="odd", folder=str(tmp_path / f"kept{number}"))
        except DataError as error:
            refusals.append(str(error))
        else:
            assert all(problem.message for problem in found.problems)
    assert refusals
    assert all(str(path) in message and len(message) < 500 for message in refusals)


def test_an_error_that_nobody_foresaw_costs_one_record(tmp_path, monkeypatch):
    original = samples._read_record

    def read(record, sample_id, *options):
        if sample_id == "good1":
            raise MemoryError("no room\nfor it")
        return original(record, sample_id, *options)

    monkeypatch.setattr(samples, "_read_record", read)
    found = load_set(
        str(write(tmp_path, [good(i) for i in range(3)], "s.json")), name="a", folder=str(tmp_path / "kept")
    )
    assert found.ids.to_pylist() == ["good0", "good2"]
    (problem,) = found.problems
    assert (problem.sample_id, problem.reason, problem.message) == ("good1", "failed", "MemoryError: no room for it")


def test_a_sample_that_no_column_can_hold_costs_no_other(tmp_path, monkeypatch):
    original = sample_sets._batch

    def make(some):
        if any(sample.id == "good1" for sample in some):
            raise OverflowError("no column")
        return original(some)

    monkeypatch.setattr(sample_sets, "_batch", make)
    path = write(tmp_path, [good(i) for i in range(5)], "s.jsonl")
    found = load_set(str(path), name="a", folder=str(tmp_path / "kept"))
    assert found.ids.to_pylist() == ["good0", "good2", "good3", "good4"]
    assert [(problem.sample_id, problem.reason) for problem in found.problems] == [("good1", "failed")]


def test_a_record_with_more_images_than_a_column_counts_is_refused(tmp_path):
    many = good(1) | {"image": ["1.jpg"] * 40_000}
    many["conversations"][0]["value"] = "<image>" * 40_000
    (sample,), (problem,) = load_samples(str(write(tmp_path, [many, good(0)], "s.json")))
    assert (sample.id, problem.reason) == ("good0", "bad_image_field")
    assert problem.message == "'image' names 40,000 images, and a record may name 32,767"


class Panic(BaseException):
    """Stands for the panics of Rust code."""


@pytest.fixture
def panicking(monkeypatch):
    class Tokeniser(token_table.BatchTokeniser):
        def __call__(self, conversations):
            if any("panic" in conversation.turns[0].text for conversation in conversations):
                raise Panic("bad split")
            return super().__call__(conversations)

    monkeypatch.setattr(token_table, "BatchTokeniser", Tokeniser)


@pytest.mark.usefixtures("panicking")
def test_a_sample_that_the_tokenizer_fails_on_costs_no_other(tmp_path, tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    given = [make_sample(str(i), "panic" if i in (3, 4) else f"what {i}?") for i in range(7)]
    found = SampleSet.of("a", given)
    tokens = tokenise_set(found, tokenizer, "vicuna_v1", folder=str(tmp_path))
    assert tokens.lengths.problems == dict.fromkeys([3, 4], " cannot be tokenised (Panic: bad split)")
    calm = [sample for sample in given if sample.turns[0].text != "panic"]
    expected = tokenise_set(SampleSet.of("a", calm), tokenizer, "vicuna_v1")
    assert [tokens.row(i) for i in (0, 1, 2, 5, 6)] == [expected.row(i) for i in range(5)]


def test_errors_that_concern_all_samples_are_no_samples_problem():
    def refuse(batch):
        raise SettingsError("the tokenizer has no end token")

    with pytest.raises(SettingsError, match="no end token"):
        list(by_halves(refuse, [1, 2], lambda item, error: None))


def test_a_process_that_the_system_ends_is_told_in_one_sentence():
    with pytest.raises(DataError, match="lack of memory: free some memory"):
        list(map_in_processes(partial(_dying), [1, 2]))


def _dying():
    return lambda item: os._exit(9)
