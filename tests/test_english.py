"""The English of docstrings, comments, settings, help texts and messages: a line is a sentence or a noun phrase.

The rule: *a line is a sentence or a noun phrase that stands alone*. It names its thing and does not begin with "Of ...",
"The same ..." or "What ...". Conditions use "if" and "when", rates use "per". Summaries are imperative or a noun phrase. A
sentence has one idea and at most 25 words; the test refuses 40. Terms are those of the field (image, run, stage, sample),
not words private to this project. The checks below know no grammar: they catch the habits that made earlier texts hard to
read, and a text that passes them must still be read by a person.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Folders that are not rewritten yet; empty this tuple folder by folder.
PENDING: tuple[str, ...] = (
    "meteor/cache/",
    "meteor/data/",
    "meteor/evaluation/",
    "meteor/storage/",
)
MAX_WORDS = 40
# Every kind of text: how a sentence opens, and words and turns that only this project uses.
OPENINGS = re.compile(r"(of|the same|what|who|as it|so|such|whose|one of it)\b", re.IGNORECASE)
PHRASES = re.compile(
    r"\b(told|wishes|lodgers?|twins?|doors?|pictures?|so (many|much) (as|at|of)|if so many|left away|as they like)\b"
    r"|\brooms?\b(?! for)|\bof it\.?$|\b\w+s an? (second|minute|hour)\b",
    re.IGNORECASE,
)
# Entries of a docstring's section have no verb of their own: a preposition in front means that the noun is missing.
ENTRY_OPENINGS = re.compile(r"(of|as|whose|that|it|its|they|these|those)\b", re.IGNORECASE)
NAMES = {"one", "told", "wishes", "marks", "asked", "door", "room", "twin", "lodger"}
SECTIONS = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Note|Example):$")
NAMED_SECTIONS = ("Args:", "Attributes:", "Raises:")
ENTRY = re.compile(r"\s*[\w*`][\w*`., ]{0,60}: ")


@dataclass(frozen=True)
class Text:
    """A docstring's part, a comment, a description, a help text or a message.

    Attributes:
        path: file, relative to the repository.
        line: its line, from 1.
        kind: "summary", "entry", "prose", "comment", "setting", "help" or "message".
        words: the text on one line.
    """

    path: str
    line: int
    kind: str
    words: str


def problems(text: Text) -> list[str]:
    """Return what is wrong with a text, in words."""
    found = []
    for sentence in sentences(text.words):
        if (opening := OPENINGS.match(sentence)) and not sentence.endswith("?"):
            found.append(f"opens with {opening[0]!r}: name the thing")
        if (phrase := PHRASES.search(sentence)) is not None:
            found.append(f"says {phrase[0]!r}: use the field's word")
        if not text.words.startswith("Letters:") and len(sentence.split()) > MAX_WORDS:
            found.append(f"has a sentence of {len(sentence.split())} words: {sentence[:60]}...")
    if text.kind in ("entry", "setting") and (opening := ENTRY_OPENINGS.match(text.words)):
        found.append(f"entry opens with {opening[0]!r}: name the thing")
    if text.kind == "summary" and not text.words.endswith((".", "?", ":")):
        found.append("summary does not end on its first line with a full stop")
    return found


def sentences(words: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.?!:;])\s+(?=[A-Z`(\"'*])", words) if part]


def docstring_texts(path: str, tree: ast.Module) -> Iterator[Text]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        first = node.body[0].lineno
        lines = docstring.splitlines()
        yield Text(path, first, "summary", lines[0])
        for start, kind, words in paragraphs(lines[1:]):
            yield Text(path, first + 1 + start, kind, words)


def paragraphs(lines: list[str]) -> Iterator[tuple[int, str, str]]:
    """Yield (index of its first line, kind, words) of each paragraph, list item and section entry after the summary."""
    parts: list[tuple[int, str, list[str]]] = []
    section, is_open = None, False
    for index, line in enumerate(lines):
        bare = line.strip()
        if not bare or bare.startswith((">>>", "|", "├", "└", "│")) or SECTIONS.match(bare):
            section = bare if SECTIONS.match(bare) else section
            is_open = False
        elif section in NAMED_SECTIONS and len(line) - len(line.lstrip()) == 4:
            name = ENTRY.match(line)
            parts.append((index, "entry", [line[name.end() :] if name else bare]))
            is_open = True
        elif is_open and not bare.startswith(("- ", "* ")):
            parts[-1][2].append(bare)
        else:
            parts.append((index, "entry" if section else "prose", [bare.removeprefix("- ")]))
            is_open = True
    for index, kind, words in parts:
        yield index, kind, " ".join(words)


def call_texts(path: str, tree: ast.Module) -> Iterator[Text]:
    """Yield descriptions of settings, argparse's texts, error messages and log messages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            for argument in node.exc.args:
                yield from constant_text(path, "message", argument)
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("setting", "operational") and len(node.args) > 1:
            yield from constant_text(path, "setting", node.args[1])
        if called in ("debug", "info", "warning", "error", "exception") and node.args:
            yield from constant_text(path, "message", node.args[0])
        for keyword in node.keywords:
            if keyword.arg in ("help", "description", "epilog"):
                yield from constant_text(path, "help", keyword.value)


def constant_text(path: str, kind: str, node: ast.expr) -> Iterator[Text]:
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    words = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
    if any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in parts):
        yield Text(path, node.lineno, kind, " ".join(words.split()))


def python_comments(path: str, source: str) -> Iterator[tuple[int, bool, str]]:
    """Yield (line, whether the comment has a line of its own, words) of each comment."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], not token.line[: token.start[1]].strip(), token.string.lstrip("#!").removeprefix(" ")


def plain_comments(source: str) -> Iterator[tuple[int, bool, str]]:
    """Yield the comments of a YAML file or a Dockerfile in the form of `python_comments`."""
    for number, line in enumerate(source.splitlines(), start=1):
        if (found := re.search(r"(^|\s)#+ (.*)", line)) is not None:
            yield number, not line[: found.start()].strip(), found[2]


def comment_texts(path: str, comments: Iterator[tuple[int, bool, str]]) -> Iterator[Text]:
    """Join the comments of neighbouring lines, as a sentence may run over several; indented lines are examples."""
    block: list[str] = []
    first = last = 0
    for line, is_own_line, words in comments:
        if words.startswith("  "):
            continue
        if block and is_own_line and line == last + 1:
            block.append(words)
        else:
            if block:
                yield Text(path, first, "comment", " ".join(block))
            block, first = [words], line
        last = line
    if block:
        yield Text(path, first, "comment", " ".join(block))


def names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of everything that a file names: variables, arguments, functions, classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def files(*folders: str, suffixes: tuple[str, ...]) -> list[str]:
    found = (file for folder in folders for file in sorted((ROOT / folder).rglob("*")) if file.is_file())
    paths = [file.relative_to(ROOT).as_posix() for file in found if file.name.endswith(suffixes)]
    return [path for path in paths if not path.startswith(PENDING)]


def report(found: list[str]) -> str:
    return f"{len(found)} texts to rewrite:\n" + "\n".join(found)


@pytest.mark.parametrize("folder", ["meteor", "pipelines", "jobs", "benchmarks"])
def test_python_texts_are_plain_english(folder):
    found = []
    for path in files(folder, suffixes=(".py",)):
        source = (ROOT / path).read_text()
        tree = ast.parse(source)
        texts = [*docstring_texts(path, tree), *call_texts(path, tree)]
        texts += comment_texts(path, python_comments(path, source))
        found += [f"{text.path}:{text.line}: {text.kind} {problem}" for text in texts for problem in problems(text)]
        found += [f"{path}:{line}: the name {name!r} says nothing" for line, name in names(tree) if name in NAMES]
    assert not found, report(found)


def test_comments_of_runs_and_infrastructure_are_plain_english():
    paths = files("jobs", "infra", suffixes=(".yaml", "Dockerfile", ".env"))
    found = [
        f"{path}:{text.line}: {text.kind} {problem}"
        for path in paths
        for text in comment_texts(path, plain_comments((ROOT / path).read_text()))
        for problem in problems(text)
    ]
    assert not found, report(found)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("entry", "of the matrices"),
        ("entry", "as B."),
        ("setting", "the same of stage 2"),
        ("prose", "Reads a row. What the writer left, it skips."),
        ("prose", "It reads 40 images a second."),
        ("comment", "The one door to Triton."),
        ("summary", "Read a row"),
        ("help", " ".join(["word"] * 41)),
    ],
)
def test_the_habits_are_found(kind, words):
    assert problems(Text("file.py", 1, kind, words))
