"""A run file that is damaged, or odd in any way, is read or refused in one sentence that names the file."""

import random
from pathlib import Path

import pytest

from meteor.config import load_run, resolve_paths
from meteor.errors import SettingsError

RUNS = Path(__file__).parents[2] / "jobs/runs"
ODD = [
    *(
        b"\x00",
        b"\xff",
        b"\t",
        b"\xef\xbb\xbf",
        b"\r\n",
        b"'",
        b": ",
        b"- ",
        b"*x",
        b"&a [*a]",
        b"<<: 1",
        b"? [1]\n: 2",
    ),
    *(
        b"9" * 5000,
        b"[" * 2000,
        b"2024-13-45",
        b"1:2:3",
        b".inf",
        b".nan",
        b"0x",
        b"0o9",
        b"1e999999",
        b"---\na: 1\n---\n",
    ),
    *(
        b"!!python/object:os.system x",
        b"!!timestamp x",
        b"!!int x",
        b"!!float x",
        b"!!bool x",
        b"!!binary x",
        b"!!set {a}",
    ),
    *(b'"\\ud83d"', b'"\\x00"', b"%YAML 9\n", b"extends: 7\n", b"extends: .\n", b"extends: [a]\n", b"output: [1]\n"),
]


def spoil(text, rng):
    place = rng.randrange(len(text) + 1)
    odd = rng.choice(ODD)
    kind = rng.randrange(5)
    if kind == 0:
        return text[:place] + odd + text[place:]
    if kind == 1:
        return text[:place] + text[place + rng.randrange(9) :]
    if kind == 2:
        return text[:place] + odd
    if kind == 3:
        lines = text.split(b"\n")
        number = rng.randrange(len(lines))
        lines[number] = lines[number].partition(b":")[0] + b": " + odd
        return b"\n".join(lines)
    return text.decode(errors="replace").encode(rng.choice(["utf-16", "utf-32", "latin-1", "utf-8-sig"]), "replace")


@pytest.mark.parametrize("num_tries", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_damaged_run_file_is_read_or_refused_in_one_sentence_that_names_it(tmp_path, num_tries):
    for file in RUNS.glob("*.yaml"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    originals = [file.read_bytes() for file in sorted(RUNS.glob("*.yaml"))]
    rng, refusals = random.Random(num_tries), []
    for _ in range(num_tries):
        text = rng.choice(originals)
        for _ in range(rng.randint(1, 3)):
            text = spoil(text, rng)
        (tmp_path / "odd.yaml").write_bytes(text)
        try:
            resolve_paths(load_run(str(tmp_path / "odd.yaml")))
        except SettingsError as error:
            refusals.append(str(error))
    assert len(refusals) > num_tries / 4
    assert all("odd.yaml" in message for message in refusals)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "name: 2024-13-45",
            r"odd\.yaml is not valid YAML: '2024-13-45' cannot be read as timestamp.*line 1, column 7",
        ),
        ("pretrain: {seed: %s}" % ("9" * 5000), r"'9+\.\.\. cannot be read as int.*line 1, column 18"),
        ("name: !!float x", "'x' cannot be read as float"),
        ("extends: 7", r"odd\.yaml: extends must be the name of a run file, and is 7"),
        ("extends: gone.yaml", r"odd\.yaml extends 'gone\.yaml', and there is no such file"),
        ("extends: %s" % ("x" * 300), "and there is no such file"),
        ('output: "a\\0b"', r"odd\.yaml: 'a\\x00b' contains a null character"),
        ('output: "\\ud83d"', "half of a surrogate pair"),
        ("&a {name: *a}", "nested too deeply"),
    ],
)
def test_values_that_no_parser_takes_are_named_with_their_place(tmp_path, text, words):
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(SettingsError, match=f"(?s){words}"):
        load_run(str(tmp_path / "odd.yaml"))


def test_an_output_whose_name_is_too_long_is_no_raw_error(tmp_path):
    (tmp_path / "odd.yaml").write_text(f"llm: {{path: {'x' * 300}}}")
    assert resolve_paths(load_run(str(tmp_path / "odd.yaml"))).llm.path == "x" * 300
