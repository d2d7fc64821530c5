"""Real processes: every engine against the plain one in one process, with unequal shares of the batch, and resuming."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from saving import save_checkpoint
from transformers import AutoModelForCausalLM

from meteor.checkpoint.folder import complete_checkpoints
from meteor.checkpoint.format import KINDS, Checkpoint
from meteor.constants import IGNORE_INDEX, IMAGE_PLACE
from meteor.model import MeteorForConditionalGeneration
from meteor.text.tokens import TokenisedSample
from meteor.train.build import checkpoint_activations, freeze_for
from meteor.train.engine import loading_for, make_engine
from meteor.train.lora import Lora, add_lora
from meteor.train.row_check import check_rows

pytestmark = pytest.mark.slow

NUM_STEPS, SAVED_AT = 4, 2
# Of two workers, the second has one sample fewer; its second micro step is the empty batch.
SHARES = {1: [[[0, 1, 2, 3]]], 2: [[[0, 1], [2]], [[3], []]]}
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


@dataclass(frozen=True)
class Case:
    """What a group of workers does: resume from ``source`` if given, train, save at `SAVED_AT` and at the end in ``name``."""

    name: str
    stage: str = "finetune"
    zero_stage: int = 0
    dtype: torch.dtype = torch.float32
    source: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    llm: str | None = None
    poisoned: bool = False  # after `SAVED_AT` every gradient is nan
    lora: Lora | None = None
    text_sampler: dict[str, Any] | None = None


def make_samples(make_features: Callable, num: int = 4) -> list:
    """Sample 2 is text alone: in its micro step one worker has no image."""
    rows = []
    for i in range(num):
        images = [make_features(f"k{i}", sliced=i == 1, seed=i)] if i != 2 else []
        ids = [1, *[IMAGE_PLACE] * len(images), 10 + i, 20 + i, 2]
        turns = [0, *[1] * 2 * len(images), *[0] * (len(ids) - 1 - 2 * len(images))]
        rows.append((TokenisedSample(ids, [IGNORE_INDEX] * (len(ids) - 2) + ids[-2:], turns), images))
    return rows


def collate_words(rows: list, make_batch: Callable) -> Any:
    """Rows of texts as a batch."""
    samples = [sample for row in rows for sample in row]
    places = iter(range(len(samples)))
    return make_batch(samples, rows=[[next(places) for _ in row] for row in rows])


def run(case: Case, folder: str, fixtures: tuple) -> None:
    """One process of the group."""
    make_model, make_features, make_batch = fixtures
    samples = make_samples(make_features)
    batches = [make_batch([samples[i] for i in share]) for share in SHARES[dist.get_world_size()][dist.get_rank()]]
    model = make_model(text_sampler=case.text_sampler)
    if case.llm is not None:
        with loading_for(zero_stage=case.zero_stage, dtype=case.dtype, options=case.options):
            llm = AutoModelForCausalLM.from_pretrained(case.llm, dtype=case.dtype)
        built = MeteorForConditionalGeneration(model.config, vision_tower=False, language_model=llm)
        built.projector.load_state_dict(model.projector.state_dict())
        model = built
    freeze_for(model, case.stage)
    if case.lora is not None:
        add_lora(model.language_model, case.lora)
    checkpoint_activations(model)
    source = None if case.source is None else Checkpoint(complete_checkpoints(f"{folder}/{case.source}")[0])
    engine = make_engine(
        model,
        zero_stage=case.zero_stage,
        dtype=case.dtype,
        device=torch.device("cpu"),
        max_grad_norm=1.0,
        empty_inputs=make_batch([]).as_inputs(),
        checkpoint=source,
        options=case.options,
    )
    for packs in (True, False):
        # Also a collective operation: it must not disturb the steps that follow.
        check_rows(engine, lambda rows: collate_words(rows, make_batch), packs=packs, vocab_size=64, dtype=case.dtype)
    root, first = f"{folder}/{case.name}", 0
    if source is not None:
        first = source.state["step"]
        save_checkpoint(engine, root, first, keep=9)
    for step in range(first, NUM_STEPS):
        torch.manual_seed(10 * step + dist.get_rank())  # as the loop does where there is dropout
        for i, batch in enumerate(batches):
            num_items = 0 if case.poisoned and step >= SAVED_AT else 8
            engine.forward_backward({**batch.as_inputs(), "num_items_in_batch": num_items}, last=i == len(batches) - 1)
        norm = engine.step(lr=1e-2 / (step + 1))
        assert math.isfinite(norm) == (num_items > 0), norm
        if step + 1 in (SAVED_AT, NUM_STEPS):
            save_checkpoint(engine, root, step + 1, keep=9)


@pytest.fixture
def start(tmp_path, make_model, make_features, make_batch, start_workers):
    def start_group(num_workers: int, case: Case) -> None:
        start_workers(num_workers, run, case, str(tmp_path), (make_model, make_features, make_batch))

    return start_group


def state_of(folder, name, which) -> dict[str, torch.Tensor]:
    """Everything in the first (0) or last (-1) checkpoint of a case."""
    checkpoint = Checkpoint(complete_checkpoints(f"{folder}/{name}")[which])
    return {f"{kind}/{key}": checkpoint.read(kind, key) for key in checkpoint.shapes for kind in KINDS}


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(state[name], values), name


def assert_close(state, expected, *, rtol, atol):
    for name, values in expected.items():
        torch.testing.assert_close(
            state[name], values, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_workers_equal_one_and_a_resumed_run_equals_an_uninterrupted_one(zero_stage, stage, tmp_path, start):
    start(1, Case("one", stage))
    start(2, Case("two", stage, zero_stage))
    straight = state_of(tmp_path, "two", -1)
    assert_close(straight, state_of(tmp_path, "one", -1), rtol=1e-3, atol=2e-5)
    start(2, Case("resumed", stage, zero_stage, source="two"))
    assert_same(state_of(tmp_path, "resumed", -1), straight)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bfloat16_resumes_bit_for_bit(zero_stage, tmp_path, start):
    start(2, Case("two", zero_stage=zero_stage, dtype=torch.bfloat16))
    start(2, Case("resumed", zero_stage=zero_stage, dtype=torch.bfloat16, source="two"))
    assert_same(state_of(tmp_path, "resumed", -1), state_of(tmp_path, "two", -1))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_resuming_with_other_workers_and_another_stage_starts_from_the_very_same_state(
    zero_stage, before, after, tmp_path, start
):
    start(before, Case("before", zero_stage=zero_stage))
    for other in {zero_stage, 0, 3}:
        start(after, Case(f"after {other}", zero_stage=other, source="before"))
        assert_same(state_of(tmp_path, f"after {other}", 0), state_of(tmp_path, "before", 0))
        assert_close(state_of(tmp_path, f"after {other}", -1), state_of(tmp_path, "before", -1), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_masters_and_moments_in_the_hosts_memory_train_and_resume_alike(zero_stage, tmp_path, start):
    start(2, Case("device", zero_stage=zero_stage))
    start(2, Case("host", zero_stage=zero_stage, options=OFFLOAD))
    assert_close(state_of(tmp_path, "host", -1), state_of(tmp_path, "device", -1), rtol=1e-3, atol=2e-5)
    start(2, Case("resumed", zero_stage=zero_stage, options=OFFLOAD, source="host"))
    assert_same(state_of(tmp_path, "resumed", -1), state_of(tmp_path, "host", -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_leaves_everything_as_it_was(zero_stage, dtype, tmp_path, start):
    start(2, Case("a", zero_stage=zero_stage, dtype=dtype, poisoned=True))
    assert_same(state_of(tmp_path, "a", -1), state_of(tmp_path, "a", 0))


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_adapters_train_alike_on_two_workers_and_resume_bit_for_bit(zero_stage, tmp_path, start, llm_folder):
    calm = Lora(rank=2, alpha=4, dropout=0.0, seed=1)
    start(1, Case("one", llm=llm_folder, lora=calm))
    start(2, Case("two", zero_stage=zero_stage, llm=llm_folder, lora=calm))
    assert_close(state_of(tmp_path, "two", -1), state_of(tmp_path, "one", -1), rtol=1e-3, atol=2e-5)
    assert any("lora_A" in name for name in state_of(tmp_path, "one", -1))
    case = Case("straight", zero_stage=zero_stage, llm=llm_folder, lora=replace(calm, dropout=0.3))
    start(2, case)
    start(2, replace(case, name="resumed", source="straight"))
    assert_same(state_of(tmp_path, "resumed", -1), state_of(tmp_path, "straight", -1))


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_text_guided_sampler_trains_alike_on_two_workers_of_which_one_has_no_question(zero_stage, tmp_path, start):
    sampler = {"layer": 0, "keep": 0.5}
    start(1, Case("one", text_sampler=sampler))
    start(2, Case("two", zero_stage=zero_stage, text_sampler=sampler))
    assert_close(state_of(tmp_path, "two", -1), state_of(tmp_path, "one", -1), rtol=1e-3, atol=2e-5)
    start(2, Case("resumed", zero_stage=zero_stage, text_sampler=sampler, source="two"))
    assert_same(state_of(tmp_path, "resumed", -1), state_of(tmp_path, "two", -1))
    start(1, Case("without"))
    without, one = state_of(tmp_path, "without", -1), state_of(tmp_path, "one", -1)
    assert not all(torch.equal(without[name], one[name]) for name in one)


def test_a_model_loaded_in_parts_trains_like_one_loaded_whole(tmp_path, start, llm_folder):
    start(2, Case("whole", zero_stage=2, llm=llm_folder))
    start(2, Case("parts", zero_stage=3, llm=llm_folder))
    assert_close(state_of(tmp_path, "parts", -1), state_of(tmp_path, "whole", -1), rtol=1e-3, atol=2e-5)
    start(2, Case("resumed", zero_stage=3, llm=llm_folder, source="parts"))
    assert_same(state_of(tmp_path, "resumed", -1), state_of(tmp_path, "parts", -1))
