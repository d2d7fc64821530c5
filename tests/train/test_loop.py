"""The plan of steps as arithmetic, and the loop with the plain engine on one process."""

import copy
import math
import pickle
import threading
import time

import pyarrow as pa
import pytest
import torch
import torch.distributed as dist

from meteor.checkpoint.folder import complete_checkpoints
from meteor.checkpoint.format import Checkpoint
from meteor.config import RunSettings
from meteor.constants import IGNORE_INDEX, IMAGE_PLACE
from meteor.data.table import SAMPLE_SCHEMA, WHOLE, SampleTable
from meteor.data.token_table import TokenTable
from meteor.errors import DataError, FailedStepError
from meteor.text.batches import TokenBatch
from meteor.text.tokens import TokenisedSample
from meteor.train import loop
from meteor.train.build import freeze_for
from meteor.train.engine import make_engine
from meteor.train.flops import ModelFlops
from meteor.train.held_out import held_out_loss
from meteor.train.loop import train
from meteor.train.plan import Recipe, StepPlan
from meteor.train.protocol import MicroStep
from meteor.train.schedule import learning_rate, native_weight

V, X = IMAGE_PLACE, IGNORE_INDEX
NUM_SAMPLES = 7


def make_table(num_samples=NUM_SAMPLES):
    """Sample i has i % 3 + 1 answer tokens; every third has no image."""
    rows, tokens = [], []
    for i in range(max(num_samples, 1)):
        images = [f"k{i}"] if i % 3 else []
        answer = [20 + i + j for j in range(i % 3)] + [2]
        ids = [1, *[V] * len(images), 10 + i, *answer]
        rows.append(
            {
                "sample_id": f"s{i}",
                "token_row": i,
                "max_text_tokens": WHOLE,
                "image_keys": images,
                "num_sub_images": len(images),
                "num_visual_tokens": 4 * len(images),
                "num_text_tokens": len(ids) - len(images),
                "num_answer_tokens": len(answer),
                "grouping_length": len(ids) + 144 * len(images),
            }
        )
        tokens.append(TokenisedSample(ids, [X] * (len(ids) - len(answer)) + answer))
    table = pa.Table.from_pylist(rows, SAMPLE_SCHEMA).slice(0, num_samples)
    return SampleTable(table, [TokenTable.of([TokenBatch.of(tokens)])])


def make_recipe(**changes):
    settings = {
        "lr": 1e-2,
        "global_batch_size": 3,
        "micro_batch_size": 2,
        "epochs": 2,
        "warmup_ratio": 0.2,
        "seed": 0,
        "native_warmup": 1.0,
        "native_weight_full": 0.2,
        "aux_loss_coefficient": 0.5,
        "batching": "grouped",
        "max_length": 40,
        "checkpoint_every_steps": 2,
        "checkpoint_every_s": 1e9,
        "keep_checkpoints": 2,
    }
    return Recipe(**{**settings, **changes})


def make_step_plan(table=None, **changes):
    return StepPlan(make_table() if table is None else table, make_recipe(**changes), "digest of the index")


class RecordingEngine:
    """Rank 1 of three, without neighbours: notes what the loop hands over."""

    rank, world_size, device = 1, 3, torch.device("cpu")

    def __init__(self, selection_sums=None):
        self.steps, self.pending = [], []
        self.selection_sums = selection_sums

    def forward_backward(self, inputs, *, last):
        self.pending.append({**inputs, "last": last})
        return MicroStep(torch.tensor(0.25), self.selection_sums)

    def step(self, lr):
        self.steps.append((lr, self.pending))
        self.pending = []
        return 1.0

    def fragments(self):
        return iter(())

    def shapes(self):
        return {}


@pytest.fixture
def make_loader(make_features, make_batch):
    def make(table, projector=None):
        def load_batches(micro_batches):
            for rows in micro_batches:
                positions = [position for row in rows for position in row]
                yield make_batch(
                    [(table.tokens(i), [make_features(key, seed=i) for key in table.image_keys(i)]) for i in positions],
                    projector,
                    rows=[[positions.index(i) for i in row] for row in rows],
                )

        return load_batches

    return make


def test_each_micro_step_gets_its_share_of_the_global_batch(make_loader, tmp_path):
    table = make_table(13)
    recipe = make_recipe(global_batch_size=8, micro_batch_size=2, epochs=1)
    plan, engine, rows = StepPlan(table, recipe, "d"), RecordingEngine(), []
    train(
        engine,
        plan,
        recipe,
        load_batches=make_loader(table),
        checkpoints=str(tmp_path),
        start_step=0,
        on_step=rows.append,
    )
    assert len(engine.steps) == len(rows) == 2
    for step, (lr, micro_steps), row in zip(plan.steps(), engine.steps, rows, strict=True):
        assert lr == learning_rate(step.index, 2, peak=1e-2, warmup_ratio=0.2)
        shares = plan.micro_steps(step, 1, 3)
        assert len(micro_steps) == len(shares)
        assert [inputs["last"] for inputs in micro_steps] == [False] * (len(shares) - 1) + [True]
        for inputs, share in zip(micro_steps, shares, strict=True):
            assert inputs["num_items_in_batch"] == plan.num_answer_tokens(step)
            assert inputs["aux_loss_coefficient"] == pytest.approx(0.5 * len(share) / len(step.positions))
            assert float(inputs["native_weight"]) == pytest.approx(native_weight(step.index, 2, full=0.2, warmup=1.0))
            assert int((inputs["labels"] != X).sum()) == sum(table.num_answer_tokens(i) for [i] in share)
        assert row["loss"] == 0.25 * len(shares)


def test_rates_are_those_of_one_of_the_workers(make_loader, tmp_path):
    table = make_table(13)
    recipe = make_recipe(global_batch_size=8, micro_batch_size=2, epochs=1)
    plan, rows = StepPlan(table, recipe, "d"), []
    flops = ModelFlops(per_token=3, per_squared_length=5, per_answer_token=7, per_visual_token=11, peak=1e4)
    train(
        RecordingEngine(),
        plan,
        recipe,
        load_batches=make_loader(table),
        checkpoints=str(tmp_path),
        start_step=0,
        on_step=rows.append,
        flops=flops,
    )
    for step, row in zip(plan.steps(), rows, strict=True):
        assert row["visual_tokens_per_s_per_gpu"] == pytest.approx(row["num_visual_tokens"] / row["seconds"] / 3)
        assert row["text_tokens_per_s_per_gpu"] == pytest.approx(row["num_text_tokens"] / row["seconds"] / 3)
        lengths = [table.lengths[position] for position in step.positions]
        of_llm = 3 * sum(lengths) + 5 * sum(length**2 for length in lengths)
        of_ends = 7 * row["num_answer_tokens"] + 11 * row["num_visual_tokens"]
        assert row["mfu"] == pytest.approx((of_llm + of_ends) / (row["seconds"] * 3 * 1e4))


def report_of_one_of_two(table, make_loader, folder):
    """A process of `test_the_slowest_worker_is_the_one_that_is_reported`."""
    rank = dist.get_rank()

    def load_slowly(micro_batches):
        for batch in make_loader(table)(micro_batches):
            time.sleep(0.3 * rank)
            yield batch

    engine, recipe, rows = RecordingEngine(), make_recipe(global_batch_size=8, micro_batch_size=4, epochs=1), []
    engine.rank, engine.world_size = rank, 2
    train(
        engine,
        StepPlan(table, recipe, "d"),
        recipe,
        load_batches=load_slowly,
        checkpoints=folder,
        start_step=0,
        on_step=rows.append,
    )
    [row] = rows
    assert row["loader_wait_s"] >= 0.3
    assert 0.5 < row["loader_wait_share"] <= 1
    assert row["loss"] == 0.25 * 2
    assert row["num_visual_tokens"] == 4 * 5


def test_the_slowest_worker_is_the_one_that_is_reported(make_loader, tmp_path, start_workers):
    start_workers(2, report_of_one_of_two, make_table(8), make_loader, str(tmp_path))


@pytest.fixture
def record(make_loader, tmp_path):
    """Run the loop with an engine that only notes; its steps, and the rows it reported."""

    def start(recipe, *, engine=None, start_step=0):
        table, rows, engine = make_table(), [], engine or RecordingEngine()
        train(
            engine,
            StepPlan(table, recipe, "d"),
            recipe,
            load_batches=make_loader(table),
            checkpoints=str(tmp_path),
            start_step=start_step,
            on_step=rows.append,
        )
        return engine.steps, rows

    return start


def native_weights(steps):
    """The weight of each step, the same in all its micro steps."""
    weights = [{float(inputs["native_weight"]) for inputs in micro_steps} for _, micro_steps in steps]
    assert all(len(one) == 1 for one in weights)
    return [pytest.approx(weight) for [weight] in weights]


def test_projectors_without_a_native_expert_get_no_weight(record):
    steps, _ = record(make_recipe(native_weight_full=None))
    assert all("native_weight" not in inputs for _, micro_steps in steps for inputs in micro_steps)


def test_the_native_weight_rises_to_its_full_value_and_stays_there(record):
    # Six steps, of which three rise.
    steps, _ = record(make_recipe(native_warmup=0.5))
    assert native_weights(steps) == [0, 0.2 / 3, 0.4 / 3, 0.2, 0.2, 0.2]


@pytest.mark.parametrize("start_step", [1, 3, 5])
def test_a_resumed_run_goes_on_with_the_weight_of_its_step(record, start_step):
    steps, _ = record(make_recipe(native_warmup=0.5), start_step=start_step)
    assert native_weights(steps) == [0, 0.2 / 3, 0.4 / 3, 0.2, 0.2, 0.2][start_step:]


def test_stage_2_has_the_full_native_weight_from_its_first_step(record):
    warmup = RunSettings().finetune.native_warmup
    assert RunSettings().pretrain.native_warmup > warmup
    steps, _ = record(make_recipe(native_warmup=warmup))
    assert native_weights(steps) == [0.2] * 6


def test_what_the_selection_did_is_a_mean_over_the_micro_steps(record):
    # Each micro step: 4 sub-images with 6 nats of visual and 2 of native entropy; 3 of 8 tokens kept by one alone.
    _, rows = record(make_recipe(), engine=RecordingEngine(torch.tensor([4.0, 6.0, 2.0, 3.0, 8.0])))
    for row in rows:
        assert (row["visual_entropy"], row["native_entropy"], row["expert_disagreement"]) == (1.5, 0.5, 0.375)
        assert all(isinstance(value, int | float) for value in row.values())


@pytest.mark.parametrize("sums", [None, torch.zeros(5)])
def test_without_a_selection_nothing_is_said_of_it(record, sums):
    _, rows = record(make_recipe(), engine=RecordingEngine(sums))
    assert not {"visual_entropy", "native_entropy", "expert_disagreement"} & rows[0].keys()


@pytest.fixture
def run(make_model, make_batch, make_loader, tmp_path):
    """Train a tiny model; ``folder`` holds its checkpoints, from the newest of which it goes on."""

    def start(folder, *, on_step=lambda row: None, load_batches=None, projector=None, calls=None, **changes):
        table, recipe = make_table(), make_recipe(**changes)
        plan = StepPlan(table, recipe, "digest of the index")
        model = make_model(projector)
        freeze_for(model, "finetune")
        done = complete_checkpoints(str(tmp_path / folder))
        checkpoint = Checkpoint(done[-1]) if done else None
        engine = make_engine(
            model,
            zero_stage=0,
            dtype=torch.float32,
            device=torch.device("cpu"),
            max_grad_norm=1.0,
            empty_inputs=make_batch([], projector).as_inputs(),
            checkpoint=checkpoint,
        )
        rows = []

        def note(row):
            rows.append(row)
            on_step({**row, "weights": model.state_dict()})

        train(
            engine,
            plan,
            recipe,
            load_batches=load_batches or make_loader(table, projector),
            checkpoints=str(tmp_path / folder),
            start_step=checkpoint.state["step"] if checkpoint else 0,
            on_step=note,
            **(calls or {}),
        )
        return model, rows

    return start


def steps_on_disk(folder):
    return [int(uri[-8:]) for uri in complete_checkpoints(str(folder))]


def test_each_step_reports_its_numbers(run):
    _, rows = run("a")
    table, plan = make_table(), make_step_plan()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    assert {row["num_steps"] for row in rows} == {6}
    for step, row in zip(plan.steps(), rows, strict=True):
        batch = [table.tokens(position) for position in step.positions]
        images = sum(len(table.image_keys(position)) for position in step.positions)
        assert row["lr"] == learning_rate(step.index, 6, peak=1e-2, warmup_ratio=0.2)
        assert row["num_samples"] == len(step.positions)
        assert row["num_visual_tokens"] == 4 * images
        assert row["num_text_tokens"] == sum(len(sample.input_ids) for sample in batch) - images
        assert row["num_answer_tokens"] == plan.num_answer_tokens(step)
        assert row["grad_norm"] > 0
        # Maps of 8 patches, of which 4 are kept; a step may have no image.
        assert ("visual_entropy" in row) == ("expert_disagreement" in row) == (images > 0)
        if images:
            assert 0 < row["visual_entropy"] < math.log(8)
            assert 0 < row["native_entropy"] < math.log(8)
            assert 0 <= row["expert_disagreement"] <= 1
        micros = [[sum(table.lengths[i] for i in one) for one in micro] for micro in plan.micro_steps(step, 0, 1)]
        positions = sum(len(micro) * max(micro) for micro in micros)
        assert row["padding_share"] == pytest.approx(1 - sum(map(sum, micros)) / positions)
        assert 0 <= row["loader_wait_s"] <= row["seconds"]
        assert row["loader_wait_share"] == row["loader_wait_s"] / row["seconds"]
        assert row["samples_per_s"] == row["num_samples"] / row["seconds"]
        assert row["visual_tokens_per_s_per_gpu"] == row["num_visual_tokens"] / row["seconds"]
        assert row["text_tokens_per_s_per_gpu"] == row["num_text_tokens"] / row["seconds"]
        assert 0.01 < row["memory_gb"] < 100
        assert "mfu" not in row
    # Random weights know nothing: about ln(64) for each of 64 tokens; and then they learn.
    assert rows[0]["loss"] == pytest.approx(4.16, abs=0.3)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_checkpoints_are_written_at_their_steps_and_at_the_end(run, tmp_path):
    seen = []
    run("a", on_step=lambda row: seen.append(steps_on_disk(tmp_path / "a")), checkpoint_every_steps=4)
    assert steps_on_disk(tmp_path / "a") == [4, 6]
    # A step is reported before its checkpoint, so that no resumed run can miss its row.
    assert seen[:4] == [[], [], [], []]
    run("b", keep_checkpoints=1)
    assert steps_on_disk(tmp_path / "b") == [6]
    assert Checkpoint(complete_checkpoints(str(tmp_path / "b"))[0]).state == {"step": 6, "epoch": 1}


def test_the_clock_asks_for_checkpoints_too(run, tmp_path):
    run("always", checkpoint_every_steps=None, checkpoint_every_s=0, keep_checkpoints=9)
    assert steps_on_disk(tmp_path / "always") == [1, 2, 3, 4, 5, 6]
    run("never", checkpoint_every_steps=None, checkpoint_every_s=1e9, keep_checkpoints=9)
    assert steps_on_disk(tmp_path / "never") == [6]


def test_a_notice_of_preemption_leads_to_one_complete_checkpoint(run, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_MEET_EVERY_S", 0.0)
    notices, seen = iter([False, False, True, True, False, True, True]), []
    run(
        "a",
        calls={"meet": lambda: next(notices)},
        on_step=lambda row: seen.append(steps_on_disk(tmp_path / "a")),
        checkpoint_every_steps=None,
        keep_checkpoints=9,
    )
    # It is complete before the next step begins: the machine may be gone by then.
    assert seen[3:5] == [[3], [3]]
    assert steps_on_disk(tmp_path / "a") == [3, 6]


def test_what_is_measured_at_a_checkpoint_is_reported_and_kept(run, tmp_path):
    losses = iter([3.0, 1.0, 2.0])
    calls = {"evaluate": lambda: {"held_out_loss": next(losses)}}
    _, rows = run("a", calls=calls, checkpoint_every_steps=2, keep_checkpoints=1)
    assert [row.get("held_out_loss") for row in rows] == [None, 3.0, None, 1.0, None, 2.0]
    # The best stays besides the newest.
    states = [Checkpoint(uri).state for uri in complete_checkpoints(str(tmp_path / "a"))]
    assert [(state["step"], state["held_out_loss"]) for state in states] == [(4, 1.0), (6, 2.0)]


def test_rows_are_stored_before_the_checkpoint_of_their_step_exists(run, tmp_path):
    seen = []

    def store():
        seen.append(steps_on_disk(tmp_path / "a"))
        return {"rows": len(seen)}

    run("a", calls={"store": store}, checkpoint_every_steps=3)
    assert seen == [[], [3]]
    kept = [Checkpoint(uri).state["rows"] for uri in complete_checkpoints(str(tmp_path / "a"))]
    assert kept == [1, 2]


def test_workers_meet_by_the_clock_and_at_the_end(run, monkeypatch):
    done, met = [], []
    calls = {"meet": lambda: met.append(len(done))}
    monkeypatch.setattr(loop, "_MEET_EVERY_S", 0.0)
    run("a", on_step=done.append, calls=calls)
    assert met == [0, 1, 2, 3, 4, 5, 6]
    monkeypatch.setattr(loop, "_MEET_EVERY_S", 1e9)
    run("b", on_step=done.append, calls=calls)
    assert met[7:] == [12]


class Crash(Exception):
    pass


def test_a_gradient_that_is_not_finite_stops_before_the_update(run, make_loader, tmp_path, monkeypatch):
    weights = []

    def poison(row):
        if row["step"] == 2:
            weights.append(copy.deepcopy(row["weights"]))
            monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *arguments: torch.tensor(torch.inf))

    with pytest.raises(FailedStepError, match=r"step 3: the gradient's norm is inf") as caught:
        run("a", on_step=lambda row: (poison(row), weights.append(row["weights"])))
    failure = caught.value.failure
    assert (failure["step"], failure["grad_norm"]) == (3, "inf")
    # Each micro batch's share of a loss that is still a number.
    shares = {(one["worker"], one["micro_batch"]): one["micro_batch_loss"] for one in failure["samples"]}
    assert sum(shares.values()) == pytest.approx(failure["loss"])
    torch.testing.assert_close(weights[-1], weights[1], rtol=0, atol=0)


@pytest.mark.parametrize("last_step", [3, 4])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(run, tmp_path, last_step):
    def crash(row):
        if row["step"] == last_step:
            raise Crash

    straight, rows = run("straight")
    with pytest.raises(Crash):
        run("broken", on_step=crash)
    assert steps_on_disk(tmp_path / "broken") == [2]
    resumed, later_rows = run("broken")
    assert [row["step"] for row in later_rows] == [3, 4, 5, 6]
    for row, later in zip(rows[2:], later_rows, strict=True):
        assert (row["loss"], row["lr"], row["grad_norm"]) == (later["loss"], later["lr"], later["grad_norm"])
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("projector", "message"),
    [
        ({"name": "mlp"}, r"step 2: the loss is nan\. "),
        ({"name": "meteor", "k": 4}, r"step 2: The native score .*not finite in fused and instruction"),
    ],
)
def test_values_that_are_not_finite_stop_before_the_step(run, make_loader, tmp_path, projector, message):
    load_batches, rows, copies = make_loader(make_table(), projector), [], []
    poisoned = list(make_step_plan().steps())[1].positions
    assert any(make_table().image_keys(position) for position in poisoned)

    def load_poisoned(micro_batches):
        for rows in micro_batches:
            [batch] = load_batches([rows])
            if {position for row in rows for position in row} & set(poisoned):
                batch.features.fill_(torch.nan)
            yield batch

    def note(row):
        rows.append(row)
        copies.append(copy.deepcopy(row["weights"]))

    with pytest.raises(FailedStepError, match=message) as caught:
        run("a", load_batches=load_poisoned, on_step=note, checkpoint_every_steps=1, projector=projector)
    failure, lr = caught.value.failure, learning_rate(1, 6, peak=1e-2, warmup_ratio=0.2)
    loss = "nan" if projector["name"] == "mlp" else None  # the other one refuses before there is a loss
    assert (failure["step"], failure["lr"], failure["loss"], failure["grad_norm"]) == (2, lr, loss, None)
    assert sorted(one["row"] for one in failure["samples"]) == sorted(poisoned)
    assert all(one["id"] == f"s{one['row']}" for one in failure["samples"])
    assert [row["step"] for row in rows] == [1]
    # The row shares the model's memory: what it holds now is what the failed step left.
    torch.testing.assert_close(rows[-1]["weights"], copies[-1], rtol=0, atol=0)
    assert steps_on_disk(tmp_path / "a") == [1]


def test_a_failed_step_says_which_worker_had_each_sample_in_which_micro_batch(make_loader, tmp_path):
    class Diverging(RecordingEngine):
        def forward_backward(self, inputs, *, last):
            self.pending.append(inputs)
            return MicroStep(torch.tensor(torch.nan if last else 0.5), None)

    table, recipe = make_table(13), make_recipe(global_batch_size=13, micro_batch_size=2)
    plan, rows = StepPlan(table, recipe, "d"), []
    with pytest.raises(FailedStepError) as caught:
        train(
            Diverging(),
            plan,
            recipe,
            load_batches=make_loader(table),
            checkpoints=str(tmp_path),
            start_step=0,
            on_step=rows.append,
        )
    step, found = next(plan.steps()), caught.value.failure["samples"]
    shares = [plan.micro_steps(step, rank, 3) for rank in range(3)]
    for one in found:
        assert [one["row"]] in shares[one["worker"]][one["micro_batch"]]
    assert len(found) == 13
    # Rank 1 knows its own numbers; its neighbours are not there.
    last = len(shares[1]) - 1
    assert {one["micro_batch"]: one["micro_batch_loss"] for one in found if one["worker"] == 1} == {
        **dict.fromkeys(range(last), 0.5),
        last: "nan",
    }
    assert pickle.loads(pickle.dumps(caught.value)).failure == caught.value.failure


def test_an_error_while_loading_comes_out_of_the_loop(run):
    def load_batches(micro_batches):
        yield from ()
        raise DataError("no such image")

    with pytest.raises(DataError, match="no such image"):
        run("a", load_batches=load_batches)


def test_the_loader_is_told_the_whole_rest_of_the_run_in_order(run, make_loader, tmp_path):
    asked, yielded, closed = [], [], []

    def load_batches(micro_batches):
        coming = list(micro_batches)
        asked.append(coming)
        try:
            for batch in make_loader(make_table())(coming):
                yielded.append(batch.num_samples)
                yield batch
        finally:
            closed.append(True)

    def crash(row):
        if row["step"] == 3:
            raise Crash

    plan = make_step_plan()
    micro_steps = [plan.micro_steps(step, 0, 1) for step in plan.steps()]
    with pytest.raises(Crash):
        run("a", load_batches=load_batches, on_step=crash)
    # Three steps trained, and the next one loaded meanwhile.
    assert yielded == [len(share) for step in micro_steps for share in step][: len(yielded)]
    assert sum(map(len, micro_steps[:3])) <= len(yielded) <= sum(map(len, micro_steps[:4]))
    run("a", load_batches=load_batches)
    assert asked == [[share for step in micro_steps[start:] for share in step] for start in (0, 2)]
    assert closed == [True, True]
    assert not [thread for thread in threading.enumerate() if "ThreadPoolExecutor" in thread.name]


def test_one_step_is_loaded_while_another_trains(make_loader, tmp_path):
    table, recipe = make_table(13), make_recipe(global_batch_size=2, micro_batch_size=2, epochs=1)
    plan, loaded = StepPlan(table, recipe, "d"), [threading.Event() for _ in range(8)]
    trained = []

    def load_batches(micro_batches):
        for i, batch in enumerate(make_loader(table)(micro_batches)):
            assert i <= len(trained) + 1
            loaded[i].set()
            yield batch

    class Alone(RecordingEngine):
        rank, world_size = 0, 1

        def step(self, lr):
            # Would wait for ever if the following step were loaded only after this one.
            following = len(self.steps) + 1
            assert following == plan.num_steps or loaded[following].wait(20)
            trained.append(following)
            return super().step(lr)

    train(
        Alone(),
        plan,
        recipe,
        load_batches=load_batches,
        checkpoints=str(tmp_path),
        start_step=0,
        on_step=lambda row: None,
    )
    assert len(trained) == plan.num_steps == 7


@pytest.mark.parametrize("batching", ["padded", "grouped", "packed"])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_the_held_out_loss_is_the_mean_over_all_answer_tokens(
    make_model, make_batch, make_loader, batching, micro_batch_size
):
    model = make_model()
    freeze_for(model, "finetune")
    engine = make_engine(
        model,
        zero_stage=0,
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_grad_norm=1.0,
        empty_inputs=make_batch([]).as_inputs(),
    )
    table, recipe = make_table(), make_recipe(batching=batching, micro_batch_size=micro_batch_size, seed=5)
    [batch] = make_loader(table)([[[position] for position in range(len(table))]])
    with torch.no_grad():
        logits = model.eval()(**{**batch.as_inputs(), "labels": None}).logits[:, :-1].double()
    labels = batch.labels[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=X)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    found = held_out_loss(engine, table, recipe, load_batches=make_loader(table))
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert model.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
