"""A command line to call, and run files to give it."""

import pytest
import yaml

from meteor.cli.main import main


@pytest.fixture
def call(capsys):
    """(exit code, stdout, stderr) of a command line."""

    def run(*argv):
        code = main([str(argument) for argument in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def write_run(tmp_path):
    def write(content, name="run.yaml"):
        file = tmp_path / name
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(file)

    return write
