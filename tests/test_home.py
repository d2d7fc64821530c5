import os
from pathlib import Path

import pytest

from meteor.config.load import load_run, resolve_paths
from meteor.errors import SettingsError
from meteor.home import expand_home


def test_a_user_without_a_home_is_told_so_and_no_folder_of_that_name_is_made(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("name: a\noutput: ~/out\n")
    assert resolve_paths(load_run("run.yaml")).output == os.path.expanduser("~/out")
    # As for a number that the system knows no user by.
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}["no such user"])
    with pytest.raises(SettingsError, match=r"'~/out' begins with a home folder, .* set HOME"):
        resolve_paths(load_run("run.yaml"))
    assert expand_home("/a/~") == "/a/~"
