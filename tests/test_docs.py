"""Every page is true: commands parse, run files load, Python imports, and every path, link, setting and test exists."""

import argparse
import ast
import contextlib
import importlib.util
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import ray
import ray.scripts.scripts

import jobs.client
import jobs.preflight
import jobs.submit
import meteor.cli.main
import pipelines.ablate
import pipelines.command
from meteor import command_line
from meteor.cli.main import main
from meteor.config import RunSettings, load_run
from meteor.config.reference import settings_page
from meteor.data.samples import load_samples

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "infra/README.md", "benchmarks/RESULTS.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
TEXT = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
# Programs from elsewhere, whose command lines nothing here can parse. The shell's own are checked by `bash -n`.
OUTSIDE = {"aws", "docker", "helm", "hf", "kubectl", "mlflow", "pip"}
SHELL = {".", "cp", "export", "head", "ls", "set", "source"}


def blocks(language: str) -> list[tuple[str, str, str]]:
    """Return (page, title, text) of all code blocks in a language; the title is "" if the block has none."""
    found = []
    for page, text in TEXT.items():
        for options, content in re.findall(rf"^```{language}\b([^\n]*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            title = re.search(r'title="([^"]+)"', options)
            found.append((page, title[1] if title else "", content))
    return found


def test_the_page_of_the_papers_rows_names_every_run_file_and_variants_that_exist():
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", TEXT["docs/paper.md"], re.MULTILINE)
    named = {name for files, _ in rows for name in re.findall(r"`(\w+)`", files)}
    assert named == {file.stem for file in (ROOT / "jobs/runs").glob("*.yaml")}
    for files, variants in rows:
        study = load_run(str(ROOT / f"jobs/runs/{re.findall(r'`([^`]+)`', files)[-1]}.yaml")).study
        for variant in re.findall(r"`(\w+)`", variants):
            assert study is not None
            assert variant in study.variants


def prose(text: str) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def inline_code() -> list[tuple[str, str]]:
    return [(page, code) for page, text in TEXT.items() for code in re.findall(r"`([^`]+)`", prose(text))]


def split_commands(block: str) -> Iterator[list[str]]:
    """Yield the words of every simple command in a shell script; redirections and assignments left out."""
    for line in block.replace("\\\n", " ").splitlines():
        reader = shlex.shlex(line, posix=True, punctuation_chars=True)
        reader.whitespace_split = True
        words: list[str] = []
        skip = False
        for word in [*reader, ";"]:
            if set(word) <= set("();|&"):
                if words:
                    yield words
                words = []
            elif set(word) <= set("<>"):
                skip = True
            elif skip:
                skip = False
            elif words or not re.match(r"\w+=", word):
                words.append(word)


COMMANDS = [
    (page, shlex.join(words))
    for page, _, text in blocks("bash")
    for words in split_commands(text)
    if words[0] not in SHELL
]
NAMED = r"(?:meteor|make|ray) [^.]|python (?:-m (?:pipelines|jobs)\.[a-z_]+|benchmarks/\w+\.py)(?: |$)"
INLINE = [(page, " ".join(code.split())) for page, code in inline_code() if re.match(NAMED, code)]


class Parsed(BaseException):
    """What a real parser made of a command line; raised in place of running the command."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments


class Refused(Exception):
    """A command line that its program refuses."""


class Incomplete(Refused):
    """A command line that only lacks required arguments."""


def refuse(message: str) -> Refused:
    incomplete = re.search(r"the following arguments are required|Missing (?:argument|command)", message)
    return (Incomplete if incomplete else Refused)(message)


@pytest.fixture
def parse(monkeypatch, capsys):
    """Run a program up to the point where its own parser has read the command line, and never further."""
    parse_fully = command_line.parse

    def parse_and_stop(parser, argv=None):
        raise Parsed(parse_fully(parser, argv))

    def parse_args_and_stop(parser, args=None, namespace=None):
        found, rest = parser.parse_known_args(args, namespace)
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        raise Parsed(found)

    def refuse_to_run(*_, **__):
        raise AssertionError("a command of a page was about to run")

    for module in (command_line, meteor.cli.main, pipelines.command, pipelines.ablate, jobs.submit, jobs.preflight):
        monkeypatch.setattr(module, "parse", parse_and_stop)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args_and_stop)
    monkeypatch.setattr(ray, "init", refuse_to_run)
    monkeypatch.setattr(subprocess, "Popen", refuse_to_run)
    monkeypatch.setattr(jobs.client, "JobSubmissionClient", refuse_to_run)

    def parse(program, words):
        monkeypatch.setattr(sys, "argv", [str(program), *words])
        try:
            main(words) if program == "meteor" else run_script(program)
        except Parsed as parsed:
            return parsed.arguments
        except SystemExit as stopped:
            if stopped.code == 0:  # --help
                return argparse.Namespace()
            raise refuse(capsys.readouterr().err.strip()) from stopped
        raise AssertionError(f"{program} reads no command line")

    return parse


def run_script(file: Path) -> None:
    """Run a file as the main program; modules that lie beside it are forgotten afterwards."""
    path, modules = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(file.parent))
    try:
        runpy.run_path(str(file), run_name="__main__")
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            place = getattr(sys.modules[name], "__file__", None) or ""
            if place.startswith((str(ROOT / "benchmarks"), str(ROOT / "tests"))):
                del sys.modules[name]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with the run files of the project and those that pages show."""
    shutil.copytree(ROOT / "jobs/runs", tmp_path / "jobs/runs")
    for _, title, text in blocks("yaml"):
        if title:
            (tmp_path / title).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(words: list[str], parse) -> None:
    """Parse one command with the parser of its program, and load the run files that it names."""
    program, *rest = words
    program = program.removeprefix(".venv/bin/")
    if program == "make":
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in rest)
    elif program == "ray":
        if "--" in rest:
            check(rest[rest.index("--") + 1 :], parse)
        parse_click(ray.scripts.scripts.cli, "ray", rest)
    elif program == "meteor":
        load_runs(parse("meteor", rest))
    elif program == "python":
        check_python(rest, parse)
    else:
        assert program in OUTSIDE | {"pytest"}


def check_python(words: list[str], parse) -> None:
    if words[0] != "-m":
        parse(ROOT / words[0], words[1:])
    elif words[1].startswith(("pipelines.", "jobs.")):
        load_runs(parse(Path(importlib.util.find_spec(words[1]).origin), words[2:]))
    else:
        assert words[1] in ("lmms_eval", "pytest")


def parse_click(command: click.Command, name: str, words: list[str]) -> None:
    try:
        context = command.make_context(name, list(words))
        if isinstance(command, click.Group):
            name, below, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            parse_click(below, name, rest)
    except click.ClickException as error:
        raise refuse(error.format_message()) from error


def load_runs(arguments: argparse.Namespace) -> None:
    if run := getattr(arguments, "run", None):
        settings = load_run(run, arguments.overrides)
        if only := getattr(arguments, "only", None):
            assert set(only) <= {*settings.study.tables, *settings.study.variants}
    for file in (getattr(arguments, name, None) for name in ("first", "second")):
        if file:
            load_run(file)


def ids(commands: list[tuple[str, str]]) -> list[str]:
    return [f"{page}: {command}" for page, command in commands]


@pytest.mark.parametrize("command", [command for _, command in COMMANDS], ids=ids(COMMANDS))
def test_commands_are_what_their_programs_take(command, parse, workspace):
    check(shlex.split(command), parse)


@pytest.mark.parametrize("command", [command for _, command in INLINE], ids=ids(INLINE))
def test_commands_in_the_text_are_what_their_programs_take(command, parse, workspace):
    # A command that is only named, such as `meteor cache show`, may lack what it needs; nothing else may be wrong.
    with contextlib.suppress(Incomplete):
        check(next(split_commands(command)), parse)


def test_a_wrong_option_is_refused(parse, workspace):
    with pytest.raises(Refused, match="unrecognized arguments: --dryrun"):
        check(shlex.split("python -m pipelines.pretrain --run jobs/runs/demo.yaml --dryrun"), parse)
    with pytest.raises(Refused, match="No such option"):
        check(shlex.split("ray job submit --workdir . -- python -m jobs.preflight --run demo"), parse)


@pytest.mark.parametrize(("page", "text"), [(page, text) for page, _, text in blocks("bash")])
def test_shell_blocks_are_shell(page, text):
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert not done.stderr


@pytest.mark.parametrize(("page", "title", "text"), blocks("yaml"))
def test_run_files_of_the_pages_are_valid(page, title, text, workspace):
    file = workspace / (title or "jobs/runs/fragment.yaml")
    file.write_text(text)
    assert main(["config", "validate", "--run", str(file)]) == 0


@pytest.mark.parametrize(("page", "title", "text"), blocks("json"))
def test_annotations_of_the_pages_are_read(page, title, text, tmp_path):
    (tmp_path / "samples.json").write_text(text)
    samples, problems = load_samples(str(tmp_path / "samples.json"))
    assert len(samples) == len(json.loads(text))
    assert not problems


@pytest.mark.parametrize(("page", "title", "text"), blocks("python"))
def test_python_of_the_pages_compiles_and_its_imports_exist(page, title, text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert all(importlib.util.find_spec(name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, name.name) for name in node.names)


@pytest.mark.parametrize(
    ("page", "path"),
    sorted(
        {
            (page, path)
            for page, text in TEXT.items()
            for path in re.findall(
                r"(?<![\w/.-])(?:jobs|meteor|pipelines|benchmarks|tests|infra|docs)/[\w./-]*\w", text
            )
        }
    ),
)
def test_paths_exist(page, path, workspace):
    path = path.replace("/.env", "/example.env")  # users copy one to the other
    assert (ROOT / path).exists() or (workspace / path).exists()


@pytest.mark.parametrize(
    ("page", "target"),
    [
        (page, link)
        for page, text in TEXT.items()
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(text))
        if "://" not in link
    ],
)
def test_links_lead_to_pages_and_headings(page, target):
    file, _, anchor = target.partition("#")
    linked = (ROOT / page).parent / file if file else ROOT / page
    assert linked.exists()
    if anchor:
        headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("name", sorted({code for _, code in inline_code() if re.fullmatch(r"test_\w+", code)}))
def test_named_tests_exist(name):
    assert any(f"def {name}(" in file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize(
    "name",
    sorted(
        {
            found[1]
            for _, code in inline_code()
            if (found := re.match(rf"((?:{'|'.join(RunSettings.model_fields)})\.\w+)(?:[=:]|$)", code))
            and not found[1].endswith((".md", ".html", ".json", ".safetensors"))
        }
    ),
)
def test_named_settings_exist(name):
    section, field = name.split(".")
    annotation = RunSettings.model_fields[section].annotation
    models = [part for part in (annotation, *getattr(annotation, "__args__", ())) if hasattr(part, "model_fields")]
    assert field in models[0].model_fields


def test_the_design_page_shows_the_floors_that_are_checked():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    floors = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert "\n".join(["```text", *floors, "```"]) in TEXT["docs/design.md"]


def test_the_settings_page_is_what_the_settings_say():
    assert TEXT["docs/settings.md"] == settings_page(), "meteor config explain --markdown > docs/settings.md"


def test_the_glossary_is_short_and_each_term_stands_once():
    table = TEXT["CONTRIBUTING.md"].partition("[start:glossary]")[2].partition("[end:glossary]")[0]
    terms = re.findall(r"^\| ([\w -]+?) \| ", table, re.MULTILINE)[1:]
    assert len(terms) == len(set(terms))
    assert 10 <= len(terms) <= 20
