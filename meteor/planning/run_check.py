"""The data check of a run: every sample set with the template and the length limit of its stage."""

from collections.abc import Callable, Sequence

from meteor.assembly import Inputs, SampleFile, pixel_settings, sample_files
from meteor.assembly.places import samples_uri
from meteor.assembly.sample_sets import as_samples
from meteor.data.collate import ImageLayout, num_image_tokens
from meteor.data.sample_sets import SampleSet
from meteor.data.samples import SampleProblem, failed
from meteor.data.table_plan import tokenisation_message, too_long_message
from meteor.data.token_table import tokenise_set
from meteor.errors import MeteorError, TokenisationError
from meteor.evaluation.question_images import is_written
from meteor.image.budget import visual_token_budget
from meteor.image.slicing import SlicePlan
from meteor.planning.data_check import CheckedSet, check_data
from meteor.planning.data_report import DataReport
from meteor.progress import ProgressLog
from meteor.text.tokens import tokenise


def check_run(
    inputs: Inputs,
    *,
    full: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Check all sample sets that a run names.

    Args:
        inputs: settings of the run, and what they name.
        full: whether to decode every image; otherwise only headers are read.
        on_progress: called with (images done, images in all).

    Raises:
        SettingsError: the run names no samples.
    """
    settings = inputs.settings
    files = [file for file in sample_files(settings) if _is_readable(inputs, file)]
    return check_data(
        {file.name: _checked(inputs, file) for file in files},
        roots=inputs.image_roots(),
        pixels=pixel_settings(settings),
        full=full,
        on_progress=on_progress,
    )


def _is_readable(inputs: Inputs, file: SampleFile) -> bool:
    """Return whether the images can be read: cache_features writes out those inside a benchmark's own files."""
    return file.stage is not None or is_written(inputs.question_set(file.name))


def _checked(inputs: Inputs, file: SampleFile) -> CheckedSet:
    settings = inputs.settings
    # The finished model answers questions with the limits of stage 2.
    options = settings.training(file.stage or "finetune")
    budget = visual_token_budget(settings.projector.name, settings.projector.settings)

    def num_visual(plans: Sequence[SlicePlan]) -> int:
        layouts = [ImageLayout(plan.grid, plan.patch_grids) for plan in plans]
        if options.sub_images == "global":
            layouts = [layout.only_global() for layout in layouts]
        return sum(num_image_tokens(layout, budget) for layout in layouts)

    make = _question_text if file.stage is None else _training_text
    samples, count_text = make(inputs, file)
    return CheckedSet(
        samples, options.max_length, lambda position, plans: count_text(position, num_visual(plans), options.max_length)
    )


# (position of a sample, number of visual tokens, max_length) -> number of tokens, or the sample's problem.
_Counter = Callable[[int, int, int], int | SampleProblem]


def _training_text(inputs: Inputs, file: SampleFile) -> tuple[SampleSet, _Counter]:
    """Return a training file's samples, and a counter of the tokens that training uses."""
    settings = inputs.settings
    assert file.stage is not None
    samples = inputs.sample_set(file.name, file.uri)
    lengths = tokenise_set(
        samples,
        inputs.tokenizer(),
        settings.training(file.stage).template,
        folder=samples_uri(settings),
        on_progress=ProgressLog(f"{file.name}: tokenising: samples"),
    ).lengths

    def count(position: int, num_visual: int, max_length: int) -> int | SampleProblem:
        sample_id = samples.ids[position].as_py()
        if position in lengths.problems:
            return SampleProblem(sample_id, "tokenisation", tokenisation_message(sample_id, lengths.problems[position]))
        num_tokens = int(lengths.num_text_tokens[position]) + num_visual
        if num_tokens > max_length and lengths.first_answer[position] >= max_length - num_visual:
            return SampleProblem(sample_id, "too_long", too_long_message(num_visual, max_length))
        return num_tokens

    return samples, count


def _question_text(inputs: Inputs, file: SampleFile) -> tuple[SampleSet, _Counter]:
    """Return a question set's samples, and a counter of the tokens of prompts."""
    tokenizer, template = inputs.tokenizer(), inputs.settings.finetune.template
    questions = inputs.question_set(file.name)

    def count(position: int, num_visual: int, max_length: int) -> int | SampleProblem:
        sample = questions.questions[position].sample
        try:
            tokens = tokenise(sample.conversation, tokenizer, template, for_generation=True, sample_id=sample.id)
        except TokenisationError as error:
            return SampleProblem(sample.id, "tokenisation", str(error))
        except MeteorError:
            raise
        except Exception as error:  # noqa: BLE001  (a text may hold anything, and must not cost the check of the others)
            return failed(sample.id, error)
        return len(tokens.input_ids) - len(sample.images) + num_visual

    return as_samples(questions), count
