import json

import pytest

from meteor.data.samples import Sample, load_samples
from meteor.errors import DataError, NotFoundError
from meteor.text.conversation import Turn


def make_record(image="1.jpg", question="<image>\nWhat?", answer="A cat.", **fields):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns} | fields


def make_file(folder, content, name="samples.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def load(folder, *records, **kwargs):
    return load_samples(make_file(folder, list(records)), **kwargs)


def test_a_record_becomes_a_sample(tmp_path):
    samples, problems = load(tmp_path, make_record(id="a", type="vqa"))
    assert samples == [Sample("a", ("1.jpg",), (Turn("human", "What?", 1), Turn("gpt", "A cat.")), "vqa")]
    assert problems == []


def test_lines_are_read_as_a_list_is(tmp_path):
    records = [make_record(id="a"), make_record(id="b", answer="line\u2028separator")]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n"
    assert load_samples(make_file(tmp_path, lines, "s.jsonl")) == load(tmp_path, *records)


@pytest.mark.parametrize("image", [None, "", []])
def test_a_record_without_image_is_text_alone(tmp_path, image):
    (sample,), _ = load(tmp_path, make_record(image=image, question="hi"))
    assert (sample.images, sample.turns[0].num_images) == ((), 0)
    (sample,), _ = load(tmp_path, {"conversations": make_record(question="hi")["conversations"]})
    assert sample.images == ()


def test_a_list_of_images_keeps_its_order(tmp_path):
    (sample,), _ = load(tmp_path, make_record(image=["2.jpg", "1.jpg"], question="<image><image>same?"))
    assert sample.images == ("2.jpg", "1.jpg")


def test_the_category_stands_in_for_the_type(tmp_path):
    samples, _ = load(tmp_path, make_record(category="ocr"), make_record(type="vqa", category="ocr"), make_record())
    assert [sample.type for sample in samples] == ["ocr", "vqa", ""]


def test_ids_are_positions_by_default_and_numbered_where_they_repeat(tmp_path):
    ids = ["a", None, "a", 7, "a#2", "a", ""]
    samples, _ = load(tmp_path, *(make_record(id=stated) for stated in ids))
    assert [sample.id for sample in samples] == ["a", "1", "a#2", "7", "a#2#2", "a#3", "6"]


def test_bad_records_are_listed_and_the_others_keep_their_ids(tmp_path):
    records = [
        make_record(id="a"),
        make_record(id="a", question="no placeholder"),
        make_record(id="a"),
        "text",
        make_record(image=3),
        make_record(image=["1.jpg", ""]),
        make_record(id="t", image=None),
        {"id": "e", "image": "1.jpg"},
        make_record(id="p", answer="<image>"),
    ]
    samples, problems = load(tmp_path, *records)
    assert [sample.id for sample in samples] == ["a", "a#3"]
    assert [(problem.sample_id, problem.reason) for problem in problems] == [
        ("a#2", "image_without_placeholder"),
        ("3", "bad_record"),
        ("4", "bad_image_field"),
        ("5", "bad_image_field"),
        ("t", "placeholder_without_image"),
        ("e", "empty_conversation"),
        ("p", "misplaced_placeholder"),
    ]
    assert all(problem.message for problem in problems)


def test_the_system_prompt_is_kept(tmp_path):
    record = make_record(id="a")
    record["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    (sample,), _ = load(tmp_path, record)
    assert sample.conversation.system == "Be brief."
    assert len(sample.turns) == 2


def test_questions_without_answers_are_for_generation(tmp_path):
    record = make_record()
    record["conversations"].pop()
    assert load(tmp_path, record)[1][0].reason == "no_answer"
    assert len(load(tmp_path, record, for_generation=True)[0]) == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("s.json", '[\n{"id": 1},\n{"id" 2}]', r"s\.json, line 3, column 7"),
        ("s.jsonl", '{"id": 1}\n\n{"id" 2}', r"s\.jsonl, line 3, column 7"),
        ("s.json", '{"id": 1}', "holds a dict"),
        ("s.csv", "a,b", r"neither \.json nor \.jsonl"),
        ("s.json", "", "line 1, column 1"),
    ],
)
def test_a_file_that_is_no_annotation_file_is_refused(tmp_path, name, content, words):
    with pytest.raises(DataError, match=words):
        load_samples(make_file(tmp_path, content, name))


def test_bytes_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "s.json").write_bytes(b"\xff\xfe[")
    with pytest.raises(DataError, match="UTF-8"):
        load_samples(str(tmp_path / "s.json"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(NotFoundError, match="nothing"):
        load_samples(str(tmp_path / "nothing.json"))


@pytest.mark.parametrize(
    ("key", "value"), [("images", ["1.jpg"]), ("images", "1.jpg"), ("image_path", "1.jpg"), ("image_paths", ["1.jpg"])]
)
def test_images_under_other_usual_keys_are_read(tmp_path, key, value):
    (sample,), problems = load(tmp_path, make_record(image=None, **{key: value}))
    assert (sample.images, problems) == (("1.jpg",), [])
    samples, (problem,) = load(tmp_path, make_record(image=None, question="What?", **{key: value}))
    assert (samples, problem.reason) == ([], "image_without_placeholder")
    assert repr(key) in problem.message


@pytest.mark.parametrize("key", ["video", "videos", "img", "picture", "image_url", "photo_file", "Audio", "visual"])
def test_media_under_keys_that_are_not_read_are_no_text_alone(tmp_path, key):
    samples, (problem,) = load(tmp_path, make_record(image=None, question="What?", **{key: "a.mp4"}))
    assert (samples, problem.reason) == ([], "bad_image_field")
    assert f"{key!r} is not read" in problem.message
    # Beside an image that is read, such keys say something about it.
    (sample,), _ = load(tmp_path, make_record(**{key: "a"}))
    assert sample.images == ("1.jpg",)


def test_images_under_two_keys_must_agree(tmp_path):
    samples, (problem,) = load(tmp_path, make_record(images=["2.jpg"]))
    assert (samples, problem.reason) == ([], "bad_image_field")
    assert "'image' and 'images', which differ" in problem.message
    assert len(load(tmp_path, make_record(images="1.jpg", image_id=7))[0]) == 1
