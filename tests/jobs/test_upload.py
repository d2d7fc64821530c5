"""A working directory is measured before it is uploaded, by Ray's own reading of the ignore files."""

import zipfile

import pytest
from ray._private.runtime_env.packaging import create_package

from jobs import upload
from jobs.client import JobServer
from jobs.spec import make_job
from jobs.upload import require_small
from meteor.errors import SettingsError


@pytest.fixture
def folder(tmp_path):
    for name, size in {
        "code.py": 300,
        "data/big/images.bin": 5000,
        "data/small.bin": 700,
        "package/weights.bin": 4000,
        "package/deep/er/notes.txt": 50,
        ".venv/lib.so": 9000,
        "package/__pycache__/code.pyc": 9000,
        "outputs/model.safetensors": 9000,
        "package/logs/a.log": 9000,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / ".gitignore").write_text("outputs/\n")
    (tmp_path / "package/.rayignore").write_text("logs/\n")
    return tmp_path


def test_what_is_measured_is_what_ray_uploads(folder, tmp_path_factory):
    archive = tmp_path_factory.mktemp("archive") / "a.zip"
    create_package(str(folder), archive, include_gitignore=True, excludes=[".git", ".venv", "venv", "__pycache__"])
    with zipfile.ZipFile(archive) as content:
        expected = {entry.filename for entry in content.infolist() if not entry.is_dir()}
    found = {str(file.relative_to(folder)) for file in upload._uploaded(folder, [])}
    assert found == expected
    assert {"code.py", "data/big/images.bin"} < found
    assert not any("logs" in name or "outputs" in name for name in found)


def test_a_large_directory_is_refused_with_its_largest_parts_and_the_cure(folder, monkeypatch, fake):
    require_small(folder)
    monkeypatch.setattr(upload, "_MAX_BYTES", 10_000)
    with pytest.raises(SettingsError, match=r"data/big/ \(5 kB\), package/ \(4.01 kB\), data/ \(700 B\).*\.rayignore"):
        require_small(folder)
    monkeypatch.setattr(upload, "_MAX_BYTES", 10)
    with pytest.raises(SettingsError, match="the working directory"):
        JobServer().submit(make_job("pretrain", "demo"))
    assert fake.submitted == []
    monkeypatch.setattr(upload, "_MAX_BYTES", 20_000)
    (folder / ".rayignore").write_text("data/\n")
    monkeypatch.setattr(upload, "_MAX_BYTES", 5000)
    require_small(folder)
