"""The data check of a run: every sample set with the template and the length limit of its stage."""

from collections.abc import Callable, Sequence

from meteor.assembly import Inputs, SampleFile, pixel_settings, sample_files
from meteor.assembly.sample_sets import as_samples
from meteor.config import RunSettings
from meteor.data.collate import ImageLayout, num_image_tokens
from meteor.data.samples import Sample
from meteor.evaluation.question_images import is_written
from meteor.image.budget import visual_token_budget
from meteor.image.slicing import SlicePlan
from meteor.planning.data_check import CheckedSet, check_data
from meteor.planning.data_report import DataReport
from meteor.text.tokens import load_tokenizer, tokenise


def check_run(
    settings: RunSettings,
    inputs: Inputs,
    *,
    full: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Check all sample sets that a run names.

    Args:
        settings: settings of the run.
        inputs: the command's inputs.
        full: decode every image, not its header alone.
        on_progress: called with (images done, images in all).

    Raises:
        SettingsError: the run names no samples.
    """
    files = [file for file in sample_files(settings) if _is_readable(settings, file, inputs)]
    return check_data(
        {file.name: _checked(settings, file, inputs) for file in files},
        roots=inputs.image_roots(settings),
        pixels=pixel_settings(settings),
        full=full,
        on_progress=on_progress,
    )


def _is_readable(settings: RunSettings, file: SampleFile, inputs: Inputs) -> bool:
    """Images inside a benchmark's own files can be read once cache_features has written them out."""
    return file.stage is not None or is_written(inputs.question_set(settings, file.name))


def _checked(settings: RunSettings, file: SampleFile, inputs: Inputs) -> CheckedSet:
    tokenizer = load_tokenizer(settings.llm.path)
    budget = visual_token_budget(settings.projector.name, settings.projector.settings)
    is_question = file.stage is None
    # Questions are asked of the finished model, with stage 2's limits.
    options = settings.training(file.stage or "finetune")
    template = settings.evaluate.template if is_question else options.template

    def count_tokens(sample: Sample, plans: Sequence[SlicePlan]) -> int:
        tokens = tokenise(sample.conversation, tokenizer, template, for_generation=is_question, sample_id=sample.id)
        layouts = [ImageLayout(plan.grid, plan.patch_grids) for plan in plans]
        if options.sub_images == "global":
            layouts = [layout.only_global() for layout in layouts]
        return len(tokens.input_ids) - len(plans) + sum(num_image_tokens(layout, budget) for layout in layouts)

    if file.stage is None:
        samples = as_samples(inputs.question_set(settings, file.name))
    else:
        samples = inputs.sample_set(file.name, file.uri)
    return CheckedSet(samples.samples, samples.problems, options.max_length, count_tokens)
