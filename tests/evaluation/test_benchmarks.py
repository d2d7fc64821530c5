"""Every published file format, read from a small folder of it that is generated here."""

import contextlib
import io
import json
import os
import random
import shutil
import typing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from meteor import storage
from meteor.config.settings import QuestionSetSettings
from meteor.errors import DataError, MeteorError, NotFoundError, SettingsError
from meteor.evaluation.benchmarks import BENCHMARKS
from meteor.evaluation.benchmarks.folder import read_parquet
from meteor.evaluation.benchmarks.others import read_verdicts
from meteor.evaluation.question_images import is_written, write_images
from meteor.evaluation.question_set import load_question_set
from meteor.evaluation.score_table import score_rows, score_table
from meteor.synthetic.benchmarks import write_benchmarks

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
FORMATS = sorted(set(BENCHMARKS) - {"llava"})


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks") / "all")


@pytest.fixture
def load(folders, tmp_path):
    def load(format, path=None, **options):
        uri = str(path or folders / format)
        return load_question_set("set", format=format, uri=uri, embedded_root=str(tmp_path / "images"), **options)

    return load


def damaged(data: bytes, is_json: bool, rng: random.Random) -> bytes:
    """Bytes flipped, cut or zeroed; or in JSON a value or key replaced by something odd."""
    if is_json and rng.random() < 0.75:
        lines = data.split(b"\n") if not data.lstrip().startswith((b"[", b"{\n", b'{"')) or b"\n{" in data else [data]
        number = rng.randrange(len(lines))
        with contextlib.suppress(ValueError):
            content = json.loads(lines[number])
            spoil(content, rng)
            lines[number] = json.dumps(content).encode()
        return b"\n".join(lines)
    start = rng.randrange(len(data))
    kind = rng.randrange(3)
    if kind == 0:
        return data[:start]
    size = rng.randrange(1, 40)
    middle = bytes(size) if kind == 1 else bytes(byte ^ (1 << rng.randrange(8)) for byte in data[start : start + size])
    return data[:start] + middle + data[start + size :]


def spoil(content, rng: random.Random) -> None:
    """Replace a value somewhere in a tree, or take it away."""
    odd = rng.choice([None, 7, -1, 1e308, "", "\ud83d", "x" * 5000, [], {}, [[]], True, 10**400, {"a": None}])
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else []
    if not keys:
        return
    key = rng.choice(list(keys))
    if isinstance(content[key], dict | list) and content[key] and rng.random() < 0.85:
        spoil(content[key], rng)
    elif rng.random() < 0.3:
        del content[key]
    else:
        content[key] = odd


@pytest.mark.parametrize("num_tries", [15, pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_file_of_any_format_is_read_or_refused_in_one_sentence(load, folders, tmp_path, format, num_tries):
    copy = Path(shutil.copytree(folders / format, tmp_path / format))
    files = [
        file
        for file in sorted(copy.rglob("*"))
        if file.suffix in (".json", ".jsonl", ".tsv", ".csv", ".parquet", ".txt")
    ]
    rng = random.Random(f"{format}{num_tries}")
    refusals = []
    for _ in range(num_tries):
        file = rng.choice(files)
        whole = file.read_bytes()
        file.write_bytes(damaged(whole, file.suffix in (".json", ".jsonl"), rng))
        try:
            questions = load(format, copy)
            if questions.embedded is not None:
                write_images(questions, {}, max_pixels=10**8, on_written=lambda number: None)
            asked = [(question, "A", "") for question in questions.questions]
            # The stage refuses a set of which nothing is left, and names its file.
            if not asked:
                assert questions.problems
                continue
            score_table(score_rows("set", asked, questions.metric), questions.questions, questions.metric)
        except MeteorError as error:
            refusals.append((file, str(error)))
        finally:
            file.write_bytes(whole)
    assert refusals
    for file, message in refusals:
        assert len(message) < 1000
        assert file.name in message or str(copy) in message


def test_settings_know_every_benchmark():
    assert set(typing.get_args(QuestionSetSettings.model_fields["format"].annotation)) == set(BENCHMARKS)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_read_asked_and_scored(load, format):
    questions = load(format)
    assert len({question.id for question in questions.questions}) == len(questions.questions) > 7
    shown_images = {name for question in questions.questions for name in question.sample.images}
    if questions.has_own_images:
        assert not is_written(questions)
        write_images(questions, {}, max_pixels=10**8, on_written=lambda number: None)
        assert is_written(questions)
    for name in shown_images:
        with Image.open(Path(questions.image_root) / name.removeprefix("@set/")) as image:
            image.load()
    # Right answers, in the words of the references, score 1.
    asked = [(question, question.answer, "") for question in questions.questions]
    table = score_table(score_rows("set", asked, questions.metric), questions.questions, questions.metric)
    if format == "mmvet":
        assert table["score"] is None
    elif format in ("textvqa", "vqav2", "vizwiz"):
        assert table["score"] > 0.95  # six of ten annotators agree, or more
    else:
        assert table["score"] == 1.0


@pytest.mark.parametrize("format", [*FORMATS, "llava"])
def test_a_missing_folder_is_named_with_its_setting_and_where_the_files_are_to_be_had(load, tmp_path, format):
    with pytest.raises(NotFoundError) as caught:
        load(format, tmp_path / "nowhere" if format != "llava" else tmp_path / "nowhere.json")
    assert "nowhere" in str(caught.value)
    if format != "llava":
        assert "data.evaluate.set.path" in str(caught.value)
        assert BENCHMARKS[format].origin in str(caught.value)


def test_a_missing_file_is_named_with_where_it_is_to_be_had(load, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(b"x")
    with pytest.raises(NotFoundError, match=r"GQA needs testdev_balanced_questions\.json or .*cs\.stanford\.edu"):
        load("gqa", tmp_path)
    (tmp_path / "testdev_balanced_questions.json").write_text('{"1": {"question": "q", "imageId": "b", "answer": "a"}}')
    with pytest.raises(NotFoundError, match=r"GQA needs images/b\.jpg .*images\.zip"):
        load("gqa", tmp_path)
    (tmp_path / "testdev_balanced_questions.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        load("gqa", tmp_path)


def test_single_images_may_be_missing_and_an_empty_file_is_named(load, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/b.jpg").write_bytes(b"x")
    file = tmp_path / "testdev_balanced_questions.json"
    records = {str(i): {"question": "q", "imageId": name, "answer": "a"} for i, name in enumerate("abc")}
    file.write_text(json.dumps(records))
    assert [question.sample.images for question in load("gqa", tmp_path).questions] == [
        ("@set/images/a.jpg",),
        ("@set/images/b.jpg",),
        ("@set/images/c.jpg",),
    ]
    file.write_text("{}")
    with pytest.raises(DataError, match="contain no questions"):
        load("gqa", tmp_path)


def test_another_split_and_ocr_are_refused_where_there_is_none(load):
    with pytest.raises(SettingsError, match=r"no split 'train' here; known: val, test-dev, test"):
        load("vqav2", split="train")
    with pytest.raises(SettingsError, match=r"remove data\.evaluate\.set\.ocr"):
        load("gqa", ocr=True)


def test_textvqa_has_ocr_tokens_in_the_prompt_only_if_asked(load):
    plain, ocr = load("textvqa"), load("textvqa", ocr=True)
    assert plain.questions[0].text.endswith(SHORT)
    assert not any("OCR" in question.text for question in plain.questions)
    with_word = next(one for one in ocr.questions if "token: " in one.text.replace("token: \n", ""))
    assert with_word.text.endswith(SHORT)
    assert "\nReference OCR token: " in with_word.text
    assert plain.digest != ocr.digest
    assert (plain.facts["ocr"], ocr.facts["ocr"]) == (False, True)


def test_vizwiz_may_be_unanswerable(load):
    suffix = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    assert load("vizwiz").questions[0].text.endswith(suffix + SHORT)


def test_submission_files_are_the_servers(load):
    dev, test = load("vqav2", split="test-dev"), load("vqav2", split="test")
    answers = {question.id: f"answer {question.id}" for question in dev.questions}
    name, rows = dev.benchmark.export(dev.folder, dev.questions, answers)
    assert name == "submission.json"
    assert {row["question_id"] for row in rows} == {int(question.id) for question in test.questions}
    assert sum(row["answer"] != "" for row in rows) == len(dev.questions) < len(rows)
    vizwiz = load("vizwiz", split="test")
    answers = {question.id: "cat" for question in vizwiz.questions}
    _, rows = vizwiz.benchmark.export(vizwiz.folder, vizwiz.questions, answers)
    assert rows[0] == {"image": "VizWiz_test_00000000.jpg", "answer": "cat"}
    assert all(not question.references for question in (*dev.questions, *vizwiz.questions))


def write_mmbench(folder, *rows):
    header = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    text = "\n".join("\t".join(map(str, row)) for row in [header, *rows])
    (folder / "mmbench_dev_20230712.tsv").write_text(text + "\n")


def test_mmbench_makes_rotations_that_the_file_lacks_and_keeps_those_it_has(load, tmp_path):
    shown = "A" * 100
    write_mmbench(
        tmp_path,
        [1, "alone?", "a hint", "None", "nan", "3", "", "B", "x", shown],
        [2, "both?", "", "u", "v", "", "", "A", "x", "1"],
        [1000002, "both?", "", "v", "u", "", "", "B", "x", "1"],
    )
    one, other = ([q for q in load("mmbench", tmp_path).questions if q.group == group] for group in ("1", "2"))
    # Options that a table reader would take for missing values stay.
    assert [q.choices for q in one] == [("None", "nan", "3"), ("nan", "3", "None"), ("3", "None", "nan")]
    assert [q.references for q in one] == [("B",), ("A",), ("C",)]
    assert [q.id for q in one] == ["1", "1000001", "2000001"]
    assert one[0].text == "a hint\nalone?\nA. None\nB. nan\nC. 3" + LETTER
    assert [(q.choices, q.references) for q in other] == [(("u", "v"), ("A",)), (("v", "u"), ("B",))]
    # Row 2 names row 1 for its image.
    shown_images = dict(load("mmbench", tmp_path).embedded())
    assert shown_images["images/1.jpg"] == shown_images["images/2.jpg"] != b""


@pytest.mark.parametrize(
    ("cells", "answer", "right"),
    [
        (["two", "one", "", "three"], "D", "three"),
        (["", "two", "one", "unknown"], "B", "two"),
        (["", "", "one", ""], "C", "one"),
    ],
)
def test_an_empty_option_between_others_moves_no_right_answer(load, tmp_path, cells, answer, right):
    write_mmbench(tmp_path, [391, "how many?", "", *cells, answer, "count", "A" * 100])
    questions = load("mmbench", tmp_path).questions
    assert len(questions) == sum(map(bool, cells))
    for question in questions:
        [letter] = question.references
        assert question.choices["ABCD".index(letter)] == right
        assert f"{letter}. {right}" in question.text


def test_a_right_answer_that_is_no_option_is_a_problem_of_its_record(load, tmp_path):
    write_mmbench(
        tmp_path,
        [1, "?", "", "u", "", "", "", "B", "x", "A" * 100],
        [2, "?", "", "u", "v", "", "", "A", "x", "A" * 100],
    )
    found = load("mmbench", tmp_path)
    assert {question.group for question in found.questions} == {"2"}
    assert [(problem.sample_id, problem.reason) for problem in found.problems] == [("1", "bad_answer")]
    record = {"data_id": "1", "question": "?", "choice_a": "u", "choice_b": None, "choice_c": "v"}
    records = [{**record, "question_id": str(i), "answer": answer} for i, answer in enumerate(["C", "B", "E"])]
    (tmp_path / "SEED-Bench.json").write_text(json.dumps({"questions": records}))
    (tmp_path / "SEED-Bench-image").mkdir()
    (tmp_path / "SEED-Bench-image/1").write_bytes(b"x")
    found = load("seed", tmp_path)
    assert [(question.choices, question.references) for question in found.questions] == [(("u", "v"), ("B",))]
    assert [problem.sample_id for problem in found.problems] == ["1", "2"]


def test_mmmu_has_several_images_a_question_and_open_questions(load):
    questions = load("mmmu").questions
    several = next(one for one in questions if len(one.sample.images) == 2)
    assert "<image 2>" in several.text
    assert several.sample.turns[0].num_images == 2
    is_open = next(one for one in questions if not one.choices)
    assert is_open.text.endswith(SHORT)
    assert questions[0].text.endswith(LETTER)
    assert {one.sample.type for one in questions} == {"Art", "Math"}


def test_pope_numbers_every_category_from_1_and_seed_has_videos_besides(load):
    assert {question.id.partition("/")[0] for question in load("pope").questions} == {
        "random",
        "popular",
        "adversarial",
    }
    assert all(not question.id.startswith("v") for question in load("seed").questions)
    assert "not those on videos" in load("seed").facts["note"]


def test_verdicts_are_numbers_or_mm_vets_own_grade_file(load, tmp_path):
    file = tmp_path / "verdicts.json"
    file.write_text(json.dumps({"v1_0": 0.5, "v1_1": {"model": ["m"], "content": ["0.2"], "score": [0.2, 0.4]}}))
    assert read_verdicts(str(file)) == pytest.approx({"v1_0": 0.5, "v1_1": 0.3})
    questions = load("mmvet")
    ids = [question.id for question in questions.questions]
    file.write_text(json.dumps(dict.fromkeys(ids, 0.25)))
    judged = load("mmvet", verdicts=str(file))
    rows = score_rows("set", [(question, "an answer", "") for question in judged.questions], judged.metric)
    assert score_table(rows, judged.questions, judged.metric)["score"] == 0.25
    assert "verdicts" in judged.facts
    file.write_text(json.dumps({"v1_0": -1}))
    with pytest.raises(DataError, match="must be in 0"):
        read_verdicts(str(file))


def test_a_question_file_of_llava_and_its_answers_file(load, tmp_path):
    file = tmp_path / "question.jsonl"
    rows = [
        {"question_id": 7, "image": "a.png", "text": "what?" + SHORT, "category": "default"},
        {"question_id": "x", "text": "why?", "answer": "because"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    questions = load("llava", file)
    assert [(q.id, q.sample.images, q.references) for q in questions.questions] == [
        ("7", ("a.png",), ()),
        ("x", (), ("because",)),
    ]
    name, answers = questions.benchmark.export(questions.folder, questions.questions, {"7": "a cat", "x": "so"})
    assert name == "answers.jsonl"
    assert answers[0] == {"question_id": 7, "prompt": "what?" + SHORT, "text": "a cat"}


def test_ids_as_text_find_answers_of_ids_as_numbers_and_a_question_without_answers_is_wrong(load, folders, tmp_path):
    folder = Path(shutil.copytree(folders / "vqav2", tmp_path / "vqav2"))
    (file,) = folder.rglob("v2_mscoco_val2014_annotations.json")
    content = json.loads(file.read_text())
    whole = load("vqav2", folder)
    lost = content["annotations"].pop(2)
    for annotation in content["annotations"]:
        annotation["question_id"] = str(annotation["question_id"])
    file.write_text(json.dumps(content))
    found = load("vqav2", folder)
    assert [(problem.sample_id, problem.reason) for problem in found.problems] == [
        (str(lost["question_id"]), "no_answer")
    ]
    assert len(found.questions) == len(whole.questions) - 1
    assert all(question.references for question in found.questions)


@pytest.mark.parametrize(
    "content", ["[1]", '{"v1": null}', '{"v1": {"other": 1}}', '{"v1": "x"}', '{"v1": {"score": [[]]}}']
)
def test_a_judges_file_of_another_form_is_refused(tmp_path, content):
    (tmp_path / "verdicts.json").write_text(content)
    with pytest.raises(DataError, match=r"verdicts\.json"):
        read_verdicts(str(tmp_path / "verdicts.json"))


def test_a_question_of_a_file_that_cannot_be_read_costs_no_other(load, tmp_path):
    file = tmp_path / "question.jsonl"
    good = {"question_id": 1, "text": "what?"}
    odd = [{"text": "why?"}, 7, {"question_id": 2, "text": 5}, {"question_id": 3, "text": "\ud83d"}]
    file.write_text("".join(json.dumps(one) + "\n" for one in [good, *odd]) + "{no json}\n" + json.dumps(good))
    found = load("llava", file)
    assert [question.id for question in found.questions] == ["1", "1#2"]
    assert [problem.reason for problem in found.problems] == ["bad_record"] * 4 + ["bad_question"]
    assert "needs question_id and a text, but has ['text']" in found.problems[0].message
    assert "line 6, column 2" in found.problems[3].message
    # LLaVA's own scripts find an answer by the id in the file.
    _, answers = found.benchmark.export(found.folder, found.questions, {"1": "a", "1#2": "b"})
    assert [(answer["question_id"], answer["text"]) for answer in answers] == [(1, "a"), (1, "b")]


def test_a_benchmark_on_s3_is_read_as_one_on_disk(load, folders, s3_root, tmp_path):
    for path in (folders / "chartqa").rglob("*"):
        if path.is_file():
            storage.upload_file(str(path), storage.join(s3_root, "chartqa", str(path.relative_to(folders / "chartqa"))))
    far, near = load("chartqa", storage.join(s3_root, "chartqa")), load("chartqa")
    assert far.digest == near.digest
    assert far.image_root == storage.join(s3_root, "chartqa")


@pytest.mark.parametrize("format", ["gqa", "mmbench"])
def test_images_are_resized_to_a_long_side_where_that_is_asked(load, format):
    questions = load(format, long_side=64)
    write_images(questions, {}, max_pixels=10**8, on_written=lambda number: None)
    for question in questions.questions:
        [name] = question.sample.images
        with Image.open(Path(questions.image_root) / name.removeprefix("@set/")) as image:
            assert max(image.size) == 64
    assert questions.facts["long_side"] == 64
    assert load(format).image_root != questions.image_root


def test_images_that_cannot_be_resized_are_left_for_the_index_to_judge(load, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    sink = io.BytesIO()
    Image.new("RGB", (10, 20)).save(sink, "PNG")
    (tmp_path / "b.png").write_bytes(sink.getvalue())
    file = tmp_path / "q.jsonl"
    names = ["a.png", "b.png", "missing.png"]
    file.write_text("\n".join(json.dumps({"question_id": n, "image": n, "text": "what?"}) for n in names))
    questions = load("llava", file, long_side=40)
    write_images(questions, {"": str(tmp_path)}, max_pixels=10**8, on_written=lambda number: None)
    root = Path(questions.image_root)
    assert (root / "a.png.png").read_bytes() == b"no image"
    with Image.open(root / "b.png.png") as image:
        assert image.size == (20, 40)
    assert not (root / "missing.png.png").exists()


def test_written_images_are_written_again_when_their_file_has_changed(load, tmp_path):
    write_mmbench(tmp_path, [1, "what?", "", "u", "v", "", "", "A", "x", "A" * 100])
    first = load("mmbench", tmp_path)
    write_images(first, {}, max_pixels=10**8, on_written=lambda number: None)
    assert is_written(load("mmbench", tmp_path))
    write_mmbench(tmp_path, [1, "what?", "", "u", "v", "", "", "A", "x", "B" * 104])
    second = load("mmbench", tmp_path)
    assert second.image_root == first.image_root
    assert not is_written(second)


def test_a_small_table_of_many_rows_is_read_a_few_at_a_time(tmp_path):
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(50_000_000, np.int8)), pa.array(["x" * 100]))
    uri = str(tmp_path / "many.parquet")
    pq.write_table(pa.table({"text": column}), uri)
    del column
    assert os.path.getsize(uri) < 1_000_000
    before = pa.total_allocated_bytes()
    rows = read_parquet(uri, ["text", "absent"])
    assert next(rows) == {"text": "x" * 100}
    assert pa.total_allocated_bytes() - before < 50_000_000
    rows.close()
