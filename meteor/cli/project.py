"""`meteor project`: run a projector over a feature cache and write files of visual tokens."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from meteor.cache import FeatureCache
from meteor.cli.images import IMAGE_HELP, find_images
from meteor.cli.options import CACHE_HELP, add_json, choose_dtype, show_progress
from meteor.evaluation.project import project_cache
from meteor.evaluation.project_folder import RECORD
from meteor.model.trained_projector import load_trained_projector
from meteor.train.build import DTYPES

_DESCRIPTION = """Run a trained projector over cached images, without a language model. Writes one .safetensors file per
image: visual tokens, the patches that were kept, and the scores by which they were chosen. A second start skips finished
images. The exit status is 1 if a named image is quarantined."""
_EPILOG = f"""A file's tensors (sub-images one after the other, the global view first, then the slices row by row):
  tokens         (all kept, LLM width)  visual tokens, in --dtype
  num_tokens     (sub-images,)          number of visual tokens per sub-image
  patch_grids    (sub-images, 2)        rows and columns of patches
  indices        (all kept,)            row * columns + column of the patch within its sub-image
  visual_scores  (all patches,)         the encoder's importance row, as shares
  native_scores  (all patches,)         attention of the instruction token, as shares
A projector that selects no patches lacks the last three. The metadata name image, cache and projector. To split the tokens:
  tensors = safetensors.torch.load_file(path)
  tokens = tensors["tokens"].split(tensors["num_tokens"].tolist())
{RECORD} in DIR names the projector, cache and type of its files; files of another projector, cache or type are not added."""


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "project",
        help="run a trained projector over a feature cache, without a language model",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cache", required=True, metavar="CACHE", help=CACHE_HELP)
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="FILE_OR_DIR",
        help="projector.safetensors of pretrain, or the model directory of finetune; local or s3://",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="output folder, local or s3://")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help=f"{IMAGE_HELP} (default: all images of the cache)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="sub-images per batch (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="type of weights and tokens (default: float32 on cpu, bfloat16 on cuda)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="start over: delete the files of an earlier run in DIR"
    )
    add_json(parser)
    parser.set_defaults(command=_project)


def _project(arguments: argparse.Namespace) -> int:
    dtype = choose_dtype(arguments.device, arguments.dtype)
    cache = FeatureCache.open(arguments.cache)
    named = find_images(cache, arguments.images) if arguments.images else {}
    done = project_cache(
        cache,
        load_trained_projector(arguments.checkpoint, device=arguments.device, dtype=dtype),
        arguments.out,
        keys=list(named) if named else None,
        names=named,
        batch_size=arguments.batch_size,
        overwrite=arguments.overwrite,
        on_progress=show_progress("images"),
    )
    print(json.dumps(asdict(done), indent=2) if arguments.json else done.to_text())
    return 1 if named and done.quarantined else 0
