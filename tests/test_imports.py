"""The library works on a bare machine: torch, transformers and pyarrow, nothing of the pipelines' packages."""

import re
import subprocess
import sys
from pathlib import Path

ABSENT = ("ray", "deepspeed", "mlflow", "boto3", "botocore", "mamba_ssm", "triton", "matplotlib", "pydantic", "scipy")
# `config` and `cli` read settings (pydantic), `report` draws (matplotlib), `synthetic` trains tokenizers (sentencepiece).
FOLDERS = ("image", "vision", "cache", "text", "ssm", "checkpoint", "projector", "data", "model", "train", "evaluation")
# Modules that `triton_backend` imports if triton is installed, and the module that lmms-eval imports.
LAZILY_IMPORTED = ("triton_scan", "triton_scan_kernels", "triton_visit", "triton_visit_kernels", "lmms")
SCRIPT = """
import importlib, pkgutil, sys, warnings
warnings.simplefilter("ignore")
absent, folders, lazy = (argument.split(",") for argument in sys.argv[1:])
sys.modules.update(dict.fromkeys(absent))
import meteor.storage, meteor.tracking
for folder in folders:
    package = importlib.import_module(f"meteor.{folder}")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name not in lazy:
            importlib.import_module(f"meteor.{folder}.{module.name}")
"""


def test_the_library_imports_without_the_packages_of_the_pipelines():
    command = [sys.executable, "-c", SCRIPT, ",".join(ABSENT), ",".join(FOLDERS), ",".join(LAZILY_IMPORTED)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_tasks_on_every_cpu_and_the_training_controller_import_no_model():
    # Each costs seconds and hundreds of megabytes in every process of the cluster that runs such a task.
    lines = ["import sys", "import pipelines.ray_parts.image_facts", "assert 'torch' not in sys.modules"]
    lines += ["import pipelines.ray_parts.slicing", "assert 'ray' not in sys.modules"]
    lines += ["import pipelines.ray_parts.log_to_mlflow", "assert 'transformers' not in sys.modules"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_that_is_read_is_unpickled():
    # Checkpoints are safetensors and JSON, features Parquet; transformers reads `.bin` weights with `weights_only`.
    root = Path(__file__).parents[1]
    for folder in ("meteor", "pipelines", "jobs"):
        for file in (root / folder).rglob("*.py"):
            if file == root / "meteor/data/bulk.py":
                continue  # it sends a function to processes that it has started itself
            found = re.search(
                r"\b(pickle|cloudpickle|dill|joblib)\.loads?\(|torch\.load\(|weights_only=False", file.read_text()
            )
            assert found is None, f"{file}: {found[0]}"
