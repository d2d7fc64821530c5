"""The library works on a bare machine: torch, transformers and pyarrow, nothing of the pipelines' packages."""

import subprocess
import sys

ABSENT = ("ray", "deepspeed", "mlflow", "boto3", "botocore", "mamba_ssm", "matplotlib", "pydantic")
# `config` and `cli` read settings (pydantic), `report` draws (matplotlib), `synthetic` trains tokenizers (sentencepiece).
ROOMS = ("image", "vision", "cache", "text", "ssm", "checkpoint", "projector", "data", "model", "train", "evaluation")
SCRIPT = """
import importlib, pkgutil, sys, warnings
warnings.simplefilter("ignore")
absent, rooms = sys.argv[1].split(","), sys.argv[2].split(",")
sys.modules.update(dict.fromkeys(absent))
import meteor.storage, meteor.tracking
for room in rooms:
    package = importlib.import_module(f"meteor.{room}")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"meteor.{room}.{module.name}")
"""


def test_the_library_imports_without_the_packages_of_the_pipelines():
    command = [sys.executable, "-c", SCRIPT, ",".join(ABSENT), ",".join(ROOMS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
