"""`meteor generate` and `meteor chat`: ask a finished model about images."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from meteor import storage
from meteor.cli.options import choose_dtype
from meteor.errors import MeteorError, SettingsError
from meteor.evaluation.answer import Answerer
from meteor.evaluation.dialogue import Dialogue, Reply, ShownImage
from meteor.evaluation.selection import select_patches
from meteor.formatting import format_duration
from meteor.projector.answering import AnswerSelection
from meteor.report import SelectionPanel, SubImageScores
from meteor.report.selection_figures import kept_figure
from meteor.train.build import DTYPES

_COMMANDS = """/image FILE        show an image with the next question
/selection FILE    write a .png figure of the patches that were kept of the last image
/new               begin a new dialogue
/help              print this text
/quit              leave, as Ctrl-D does; Ctrl-C stops an answer"""


def add_commands(commands: Any) -> None:
    generate = commands.add_parser(
        "generate", help="answer one question about images", description="Answer one question, greedily."
    )
    _add_model(generate)
    generate.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="an image, local or s3://; repeatable"
    )
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    generate.add_argument(
        "--show-selection",
        metavar="FILE",
        help="write a .png figure of the patches that were kept of the first image",
    )
    generate.add_argument("--stats", action="store_true", help="print number of tokens and speed on standard error")
    generate.set_defaults(command=_generate)
    chat = commands.add_parser(
        "chat",
        help="talk with a model about images",
        description="Talk with a model; a question may refer to earlier questions, answers and images.",
        epilog=_COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model(chat)
    chat.add_argument("--image", action="append", default=[], metavar="FILE", help="images of the first question")
    chat.add_argument("--stats", action="store_true", help="print number of tokens and speed after each answer")
    chat.set_defaults(command=_chat)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="model directory that finetune writes, local or s3://"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=256,
        metavar="N",
        help="largest number of tokens in an answer (default: %(default)s)",
    )
    parser.add_argument(
        "--k",
        type=int,
        metavar="N",
        help="most visual tokens per sub-image, if the projector lets it be chosen (default: the largest number of training)",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is a GPU, else cpu")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="type of the weights (default: float32 on cpu, bfloat16 on cuda)"
    )


def _open(arguments: argparse.Namespace) -> Dialogue:
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    answerer = Answerer(arguments.model, device=device, dtype=choose_dtype(device, arguments.dtype))
    return Dialogue(answerer, AnswerSelection(k=arguments.k))


def _generate(arguments: argparse.Namespace) -> int:
    if arguments.show_selection and not arguments.image:
        raise SettingsError("--show-selection draws on an image: give an image with --image")
    dialogue = _open(arguments)
    for uri in arguments.image:
        dialogue.show(uri)
    _answer(dialogue, arguments.prompt, arguments)
    if arguments.show_selection:
        write_selection(dialogue, dialogue.images[0], arguments.show_selection)
        print(f"kept patches: {arguments.show_selection}", file=sys.stderr)
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    dialogue, is_terminal = _open(arguments), sys.stdin.isatty()
    for uri in arguments.image:
        _print_shown(dialogue.show(uri))
    if is_terminal:
        print("Ask a question; /help lists the commands.", file=sys.stderr)
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            return 0
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return 0
        try:
            if command == "/new":
                dialogue = Dialogue(dialogue.answerer, dialogue.selection)
            elif command == "/image":
                _print_shown(dialogue.show(argument.strip()))
            elif command == "/selection":
                if not dialogue.images:
                    raise SettingsError("no image has been shown: enter /image FILE first")
                write_selection(dialogue, dialogue.images[-1], argument.strip())
            elif line.startswith("/"):
                print(_COMMANDS, file=sys.stderr)
            elif line:
                _answer(dialogue, line, arguments)
        except KeyboardInterrupt:
            print()
        except MeteorError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)


def _print_shown(shown: ShownImage) -> None:
    count = len(shown.features.patch_grids)
    size = f"{shown.image.width} x {shown.image.height}"
    print(f"{shown.uri}: {size} pixels, {count} sub-image{'s' if count > 1 else ''}", file=sys.stderr)


def _answer(dialogue: Dialogue, text: str, arguments: argparse.Namespace) -> None:
    reply = dialogue.ask(
        text, max_new_tokens=arguments.max_new_tokens, on_text=lambda piece: print(piece, end="", flush=True)
    )
    print()
    if arguments.stats:
        print(_stats(reply), file=sys.stderr)


def _stats(reply: Reply) -> str:
    rate = "" if reply.tokens_per_s is None else f", then {reply.tokens_per_s:.3g} tokens/s"
    first = f"{format_duration(reply.first_token_s)} to the first token"
    return f"prompt of {reply.num_prompt_tokens:,} tokens, {first}; {reply.num_tokens:,} tokens{rate}"


def write_selection(dialogue: Dialogue, shown: ShownImage, file: str) -> None:
    """Draw the patches that the projector keeps of an image.

    Raises:
        SettingsError: the projector chooses no patches, or the file is no .png.
    """
    if not file.endswith(".png"):
        raise SettingsError(f"the figure's file {file!r} must end in .png")
    model = dialogue.answerer.model
    sub_images = select_patches(
        model.projector, shown.features, select_layer=model.config.select_layer, k=dialogue.selection.k
    )
    scores: Sequence[SubImageScores] = [
        SubImageScores(sub_image.combined, sub_image.kept, sub_image.visual, sub_image.native)
        for sub_image in sub_images
        if sub_image.combined is not None
    ]
    if len(scores) != len(sub_images):
        raise SettingsError(
            f"the projector {model.config.projector['name']!r} computes its tokens from all patches: it selects none, and "
            "there is no selection to draw"
        )
    plan = dialogue.answerer.processor.image_processor.pixels.plan(shown.image.width, shown.image.height)
    panel = SelectionPanel(shown.uri, "", "", "", shown.image, plan, tuple(scores))
    storage.write_bytes(file, kept_figure(panel, "kept").png)
