"""Both pages: everything that was put in is there, text stays text, nothing is fetched from elsewhere."""

import html
import re
from pathlib import Path

import pytest
from PIL import Image

from meteor.errors import DataError
from meteor.report import write_report
from meteor.report.page import escape_markdown
from meteor.report.tables import score_facts

NASTY = '<script>alert("1")</script> | *x* `y`'


def write_and_read(folder, **arguments):
    paths = write_report(str(folder), **arguments)
    return Path(paths.markdown).read_text(), Path(paths.html).read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def full_report(folder, make_run, make_variant, make_score, make_prediction, make_panel):
    """Markdown and HTML of two variants with everything given; drawn once, only read by the tests."""

    def make_stages(k):
        settings = {"projector": {"k": k}, "note": NASTY}
        return {
            stage: make_run(stage, settings=settings, git_commit="c0ffee", versions={"torch": "2.11.0"})
            for stage in ("pretrain", "finetune", "evaluate")
        }

    predictions = [make_prediction(question=NASTY), make_prediction("q2", prediction="no", score=0.0)]
    score = make_score(0.625, num_quarantined=3, by_type={"count": make_score(), "colour": make_score()})
    return write_and_read(
        folder,
        title=NASTY,
        variants=[
            make_variant("meteor", stages=make_stages(144), scores={"shapes": score}, predictions=predictions),
            make_variant("mlp", stages=make_stages(576), scores={"shapes": score}, predictions=predictions),
        ],
        panels=[make_panel(question=NASTY)],
        cache={"num_distinct_images": 1250881, "codec": "float16", "quarantine_reasons": {"truncated": 12}},
        notes=["Made-up numbers.", NASTY],
        thumbnails={"a.png": Image.new("RGB", (300, 200))},
    )


def test_both_pages_hold_what_was_put_in(full_report):
    for page in full_report:
        for expected in (
            *("Made-up numbers.", "62.5 % (52.5 – 72.5)", "34.98 M", "540.2", "8 s", "projector.k", "576"),
            *("1,250,881", "float16", "truncated", "c0ffee", "2.11.0", "a cat", "a dog", "37.08 M", "✓ yes", "✗ no"),
            "3 questions could not be asked",
        ):
            assert expected in page
        assert "Not in this report" not in page


def test_user_text_cannot_break_the_html(full_report):
    _, page = full_report
    assert "<script" not in page
    # Heading, title, note, panel, prediction; once for each of the two distinct settings, there as JSON.
    assert html.unescape(page).count('<script>alert("1")</script>') == 5
    assert html.unescape(page).count(r"<script>alert(\"1\")</script>") == 2


def test_user_text_cannot_break_the_markdown(full_report):
    page, _ = full_report
    outside_code = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    assert "<script" not in outside_code
    rows = [line for line in outside_code.splitlines() if "figures/thumbnail" in line]
    assert len(rows) == 2
    for row in rows:
        assert len(re.findall(r"(?<!\\)\|", row)) == 6


def test_the_html_page_fetches_nothing(full_report):
    _, page = full_report
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert "url(" not in page
    assert "@import" not in page


def test_every_link_inside_the_html_page_has_a_target(full_report):
    _, page = full_report
    assert set(re.findall(r'href="#([^"]*)"', page)) == set(re.findall(r'<h2 id="([^"]*)"', page))


def test_every_figure_has_a_text_for_those_who_cannot_see_it(full_report):
    _, page = full_report
    images = re.findall(r"<img[^>]*>", page)
    # Two losses, throughput, scores, kept, heat, and the same thumbnail beside two questions.
    assert len(images) == 8
    assert all(re.search(r'alt="[^"]+"', image) for image in images)


def test_every_figure_of_the_markdown_page_is_a_file(full_report, folder):
    page, _ = full_report
    names = set(re.findall(r"\]\((figures/[^)]*)\)", page))
    assert names == {f"figures/{path.name}" for path in (folder / "figures").iterdir()}
    assert len(names) == 7


def test_markdown_tables_have_rows_as_wide_as_their_heads(full_report):
    page, _ = full_report
    tables = re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE)
    assert len(tables) >= 8
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
        assert set(table.splitlines()[1]) <= set("| -:")


def test_missing_pieces_are_said_plainly(tmp_path, make_run, make_variant):
    variants = [make_variant("half", stages={"pretrain": make_run(finished=False)}), make_variant("nothing", stages={})]
    for page in write_and_read(tmp_path, title="t", variants=variants):
        for expected in (
            "Not in this report",
            "half: stage pretrain has not finished; it had reached step 2.",
            "nothing: stage pretrain was not run.",
            "No facts about the feature cache were given.",
            "No step was reported, so there is no curve.",
            "No variant was evaluated.",
            "No selection was drawn.",
            "No predictions were given.",
            "No package versions were recorded.",
        ):
            assert expected in page


def test_a_report_of_nothing_but_a_name_is_written(tmp_path, make_variant):
    variants = [make_variant("nothing", stages={}, parameters=None, tokens=None)]
    for page in write_and_read(tmp_path, title="t", variants=variants):
        assert "There is only one variant, so there is nothing to compare." in page
        assert "No stage was run, so no settings were recorded." in page
        assert "No training stage reported a step." in page


def test_variants_must_be_told_apart_by_name(tmp_path, make_variant):
    with pytest.raises(DataError, match="each name once"):
        write_report(str(tmp_path), title="t", variants=[make_variant("a"), make_variant("a")])
    with pytest.raises(DataError, match="at least one"):
        write_report(str(tmp_path), title="t", variants=[])


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("local_to_single", "local_to_single"),
        ("_emphasis_", r"\_emphasis\_"),
        ("a\nb | c", r"a b \| c"),
        ("<b> & [x](y)", r"&lt;b&gt; &amp; \[x\](y)"),
    ],
)
def test_markdown_is_escaped_but_names_stay_readable(text, escaped):
    assert escape_markdown(text) == escaped


def test_a_set_that_cannot_be_scored_here_says_so_and_has_no_figure(make_variant, make_score, tmp_path):
    unscored = {**make_score(), "score": None, "interval": None, "majority_score": None, "title": "MM-Vet"}
    paths = write_report(
        str(tmp_path),
        title="run",
        variants=[make_variant(scores={"mmvet": unscored, "gqa": make_score(note="a note")})],
    )
    text = Path(paths.markdown).read_text()
    assert "not scored here" in text
    assert "MM-Vet; Exact match, version 1." in text
    assert "Exact match, version 1; a note." in text
    assert [file.name for file in (tmp_path / "figures").glob("scores_*")] == ["scores_02.png"]


def test_footnotes_stand_below_their_table_on_both_pages(tmp_path, make_variant, make_score):
    table = make_score(0.5, benchmark="gqa", split="val_all", metric="exact_match")
    markdown, page = write_and_read(tmp_path, title="t", variants=[make_variant(scores={"gqa": table})])
    assert "| 50.0ᵃ |" in markdown
    assert "\n\nᵃ GQA val_all instead of testdev_balanced (not comparable)\n" in markdown
    assert ">50.0<sup>a</sup></td>" in page
    assert "<li><sup>a</sup> GQA val_all instead of testdev_balanced (not comparable)</li>" in page
    assert "0 of 12" in markdown
    assert "0&nbsp;of&nbsp;12" in page


def test_the_facts_of_a_set_name_its_preset_and_what_the_run_changed(make_score):
    changed = make_score(preset="llava_uhd", changes={"long_side": None, "ocr": False}, limit=20)
    as_published = make_score(preset="llava_uhd", changes={}, long_side=1024, selection={"k": 64})
    facts = {
        "a": "LLaVA's format; Exact match, version 1; preset llava_uhd changed by long_side=original, ocr=false; only the "
        "first 20 questions.",
        "b": "LLaVA's format; Exact match, version 1; images resized to 1,024 pixels; preset llava_uhd; k=64 when answering.",
    }
    assert score_facts({"a": changed}) == [facts["a"]]
    assert score_facts({"a": changed, "b": as_published, "c": changed}) == [f"a, c: {facts['a']}", f"b: {facts['b']}"]
