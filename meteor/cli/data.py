"""`meteor data check`: are samples and images of a run there, readable, and short enough?"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from meteor.assembly import SampleFile, image_roots, load_questions, pixel_settings, read_samples, sample_files
from meteor.cli.options import add_json, add_run, read_run, show_progress
from meteor.config import RunSettings
from meteor.data.collate import ImageLayout, num_image_tokens
from meteor.data.samples import Sample
from meteor.evaluation.question_images import is_written
from meteor.image.budget import visual_token_budget
from meteor.image.slicing import SlicePlan
from meteor.planning.data_check import CheckedSet, check_data
from meteor.planning.data_report import DataReport
from meteor.text.tokens import load_tokenizer, tokenise


def add_commands(commands: Any) -> None:
    actions = commands.add_parser("data", help="check a run's samples and images").add_subparsers(required=True)
    check = actions.add_parser("check", help="missing, unreadable and duplicate images, bad records, lengths")
    add_run(check)
    check.add_argument("--full", action="store_true", help="decode every image: finds truncated ones and duplicates")
    add_json(check)
    check.set_defaults(command=_check)


def _check(arguments: argparse.Namespace) -> int:
    report = check_run(read_run(arguments), full=arguments.full, progress=not arguments.json)
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report.to_text())
    return 0 if report.ok else 1


def check_run(settings: RunSettings, *, full: bool = False, progress: bool = False) -> DataReport:
    """Check all sample sets that a run names, each with the template and length limit of its stage.

    Raises:
        SettingsError: the run names no samples.
    """
    sets = {file.name: _checked(settings, file) for file in sample_files(settings) if _is_readable(settings, file)}
    return check_data(
        sets,
        roots=image_roots(settings),
        pixels=pixel_settings(settings),
        full=full,
        on_progress=show_progress("images") if progress else None,
    )


def _is_readable(settings: RunSettings, file: SampleFile) -> bool:
    """Images that come inside a benchmark's files are there once cache_features has begun."""
    return file.stage is not None or is_written(load_questions(settings, file.name))


def _checked(settings: RunSettings, file: SampleFile) -> CheckedSet:
    stage = settings.training(file.stage)
    template = stage.template if file.stage else settings.evaluate.template
    tokenizer = load_tokenizer(settings.llm.path)
    budget = visual_token_budget(settings.projector.name, settings.projector.settings)

    def count_tokens(sample: Sample, plans: Sequence[SlicePlan]) -> int:
        is_question = file.stage is None
        tokens = tokenise(sample.conversation, tokenizer, template, for_generation=is_question, sample_id=sample.id)
        layouts = [ImageLayout(plan.grid, plan.patch_grids) for plan in plans]
        if stage.sub_images == "global":
            layouts = [layout.only_global() for layout in layouts]
        return len(tokens.input_ids) - len(plans) + sum(num_image_tokens(layout, budget) for layout in layouts)

    samples, problems = read_samples(settings, file)
    return CheckedSet(samples, problems, stage.max_length, count_tokens)
