"""Sample sets: the samples of a file as columns, read once for each content."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meteor import storage
from meteor.config import settings_digest
from meteor.data import digests, sample_sets
from meteor.data.sample_sets import SampleSet, load_set
from meteor.data.samples import load_samples
from meteor.data.token_table import tokenise_set
from meteor.errors import DataError
from meteor.text.tokenizer import load_tokenizer


def make_record(number, *, image=None, question="What?", answer="A cat.", **fields):
    shown = {"image": image} if image else {}
    question = f"<image>\n{question}" if image else question
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": f"s{number}", **shown, "conversations": turns, **fields}


def make_records(count):
    records = [
        make_record(i, image=f"{i % 7}.jpg" if i % 3 else None, answer=f"é {i}", type="vqa") for i in range(count)
    ]
    records[1]["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    records[2]["conversations"].pop()
    return records


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "samples.json"
    path.write_text(json.dumps(make_records(10)))
    return str(path)


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / "kept")


def test_a_set_holds_what_the_file_does(file, folder):
    expected, problems = load_samples(file)
    for _ in range(2):
        found = load_set(file, name="pretrain", folder=folder)
        assert list(found) == expected
        assert (len(found), found.problems, found.name) == (9, problems, "pretrain")
        assert found.ids.to_pylist() == [sample.id for sample in expected]
        assert [tuple(names) for names in found.images.to_pylist()] == [sample.images for sample in expected]
        assert found.image_names == {name for sample in expected for name in sample.images}


def test_a_file_is_parsed_once_and_hashed_once(file, folder, tmp_path, monkeypatch):
    calls = Counter()
    for module, name in ((sample_sets, "samples_in"), (digests, "file_digest")):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *given, name=name, original=original: calls.update([name]) or original(*given)
        )
    first = load_set(file, name="a", folder=folder)
    assert load_set(file, name="b", folder=folder).digest == first.digest
    assert calls == {"samples_in": 1, "file_digest": 1}
    # A copy is read to be hashed, and not parsed.
    copy = tmp_path / "copy.json"
    copy.write_bytes((tmp_path / "samples.json").read_bytes())
    assert load_set(str(copy), name="c", folder=folder).digest == first.digest
    assert calls == {"samples_in": 1, "file_digest": 2}
    copy.write_text(json.dumps(make_records(11)))
    assert len(load_set(str(copy), name="d", folder=folder)) == 10


def test_a_file_that_is_refused_leaves_nothing_that_a_later_reading_takes(tmp_path, folder):
    path = tmp_path / "samples.json"
    path.write_text(json.dumps(make_records(10))[:-5])
    for _ in range(2):
        with pytest.raises(DataError, match="not valid JSON"):
            load_set(str(path), name="a", folder=folder)
    path.write_text(json.dumps(make_records(10)))
    assert len(load_set(str(path), name="a", folder=folder)) == 9


def test_a_file_that_changes_while_it_is_read_is_refused(file, folder, monkeypatch):
    def change(files, prefix):
        yield from load_samples(files.uri)[0]
        with open(files.uri, "a") as content:
            content.write("\n")

    with monkeypatch.context() as patched:
        patched.setattr(sample_sets, "samples_in", change)
        with pytest.raises(DataError, match="changed while it was read"):
            load_set(file, name="a", folder=folder)
    assert len(load_set(file, name="a", folder=folder)) == 9


def test_half_of_a_surrogate_pair_is_the_records_problem(tmp_path, folder):
    path = tmp_path / "samples.json"
    path.write_text(json.dumps([make_record(0), make_record(1, answer="\ud83d"), make_record("\udc00")]))
    found = load_set(str(path), name="a", folder=folder)
    assert [sample.id for sample in found] == ["s0", "s?"]
    assert [(one.sample_id, one.reason) for one in found.problems] == [("s1", "bad_text")]


@settings(max_examples=30, deadline=None)
@given(fraction=st.floats(0.01, 0.99), seed=st.integers(0, 9), count=st.integers(3, 40))
def test_a_share_is_the_seeded_one_in_the_order_of_the_file(fraction, seed, count):
    samples = SampleSet.of("a", [sample_sets.Sample(str(i), (), ()) for i in range(count)])
    ranked = sorted(range(count), key=lambda i: settings_digest([seed, i]))
    expected = sorted(ranked[: max(1, round(fraction * count))])
    share = samples.share(fraction, seed)
    assert [int(sample.id) for sample in share] == expected == [int(name) for name in share.ids.to_pylist()]
    assert samples.share(1, seed) is samples
    assert share.selection != samples.selection == ""


def test_shares_of_a_stored_set_are_read_across_its_batches(file, folder, monkeypatch):
    monkeypatch.setattr(sample_sets, "_BATCH_SIZE", 4)
    whole = list(load_set(file, name="a", folder=folder))
    some = load_set(file, name="a", folder=folder).select([0, 3, 4, 8])
    assert list(some) == [whole[i] for i in (0, 3, 4, 8)]
    assert list(some.select([1, 3])) == [whole[3], whole[8]]
    assert some.ids.to_pylist() == [whole[i].id for i in (0, 3, 4, 8)]


def test_a_prefix_names_samples_and_problems(file, folder):
    found = load_set(file, name="a", folder=folder).with_prefix("b.json/")
    assert [sample.id for sample in found] == found.ids.to_pylist()
    assert all(sample.id.startswith("b.json/s") for sample in found)
    assert [one.sample_id for one in found.problems] == ["b.json/s2"]


def test_samples_that_another_set_has_too_are_counted_by_images_and_dialogue(file, folder):
    trained = load_set(file, name="a", folder=folder)
    same = list(trained)[:4]
    others = [
        sample_sets.replace(same[0], images=("other.jpg",)),
        sample_sets.replace(same[1], turns=(same[1].turns[0], same[1].turns[1]._replace(text="No."))),
        sample_sets.replace(same[2], id="another id"),
    ]
    assert SampleSet.of("held out", [*same, *others]).count_shared([SampleSet.of("none", []), trained]) == 5


def test_records_and_tokens_live_on_s3_too(s3_root, tokenizer_folder, tmp_path):
    storage.write_bytes(f"{s3_root}/samples.json", json.dumps(make_records(40)).encode())
    tokenizer = load_tokenizer(tokenizer_folder)
    (tmp_path / "samples.json").write_text(json.dumps(make_records(40)))
    local = load_set(str(tmp_path / "samples.json"), name="a", folder=str(tmp_path / "kept"))
    expected = tokenise_set(local, tokenizer, "vicuna_v1")
    for _ in range(2):
        found = load_set(f"{s3_root}/samples.json", name="a", folder=f"{s3_root}/kept")
        assert list(found) == list(local)
        tokens = tokenise_set(found, tokenizer, "vicuna_v1", folder=f"{s3_root}/kept")
        assert [tokens.row(i) for i in range(39)] == [expected.row(i) for i in range(39)]
        assert tokens.lengths.num_answer_tokens.tolist() == expected.lengths.num_answer_tokens.tolist()
        assert tokens.uri.startswith(found.records.rpartition("/")[0])
