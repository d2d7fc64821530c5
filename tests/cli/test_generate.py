"""`meteor generate` and `meteor chat` as a user calls them."""

import io
import re

import pytest
from PIL import Image


@pytest.fixture
def shown(make_image, png, tmp_path):
    (tmp_path / "a.png").write_bytes(png(make_image(112, 56)))
    return str(tmp_path / "a.png")


@pytest.fixture
def chat(call, finished_model, monkeypatch):
    def chat(*lines, options=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        return call("chat", "--model", finished_model, "--max-new-tokens", 5, *options)

    return chat


def test_generate_answers_and_draws_what_was_kept(call, finished_model, shown, tmp_path):
    figure = tmp_path / "kept.png"
    options = ["--image", shown, "--prompt", "what?", "--max-new-tokens", 5]
    code, out, err = call("generate", "--model", finished_model, *options, "--show-selection", figure, "--stats")
    assert code == 0
    assert len(out.split("\n")) == 2
    assert "tokens to the first" not in out
    assert "to the first token; 5 tokens, then" in err
    with Image.open(figure) as image:
        assert image.width > 100
    again = call("generate", "--model", finished_model, *options)
    assert again[1] == out


def test_k_sets_the_number_of_visual_tokens(call, finished_model, shown):
    sizes = []
    for k in (None, 4, 1):
        more = [] if k is None else ["--k", k]
        options = ["--image", shown, "--prompt", "what?", "--max-new-tokens", 1, "--stats", *more]
        code, _, err = call("generate", "--model", finished_model, *options)
        assert code == 0
        sizes.append(int(re.search(r"prompt of (\d+) tokens", err)[1]))
    # The model was trained with 4, and the image has 3 sub-images.
    assert sizes[0] == sizes[1] == sizes[2] + 3 * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "x", "--k", 0], "k=0: give projector 'meteor' a whole number"),
        (["--prompt", "x", "--show-selection", "a.png"], "give an image with --image"),
        (["--prompt", "x", "--image", "nowhere.png"], "nowhere.png"),
        (["--prompt", " "], "the question is empty"),
    ],
)
def test_what_is_wrong_is_said(call, finished_model, options, message):
    code, _, err = call("generate", "--model", finished_model, *options)
    assert code == 2
    assert message in err


def test_a_figure_must_be_png(call, finished_model, shown, tmp_path):
    options = ["--image", shown, "--prompt", "x", "--max-new-tokens", 1, "--show-selection", tmp_path / "a.jpg"]
    code, _, err = call("generate", "--model", finished_model, *options)
    assert (code, "must end in .png" in err) == (2, True)


def test_a_dialogue_with_commands_goes_on_after_mistakes(chat, shown, tmp_path):
    code, out, err = chat(
        "hello?",
        f"/image {shown}",
        "what is it?",
        f"/selection {tmp_path / 'kept.png'}",
        "/image nowhere.png",
        "/unknown",
        "/new",
        "hello?",
        "/quit",
        "never asked",
    )
    assert code == 0
    answers = out.splitlines()
    assert len(answers) == 3
    assert answers[0] == answers[2]  # a new dialogue knows nothing of the first
    assert f"{shown}: 112 x 56 pixels, 3 sub-images" in err
    assert "NotFoundError: nowhere.png" in err
    assert "/selection FILE" in err
    assert (tmp_path / "kept.png").exists()


def test_a_selection_without_an_image_is_refused_and_the_end_of_the_input_leaves(chat):
    code, out, err = chat("/selection a.png")
    assert (code, out) == (0, "")
    assert "no image has been shown" in err
