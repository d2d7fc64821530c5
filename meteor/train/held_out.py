"""Loss of held-out samples, by which the best checkpoint is chosen."""

from contextlib import closing
from dataclasses import replace

import torch

from meteor.data.table import SampleTable
from meteor.train.loop import LoadBatches
from meteor.train.plan import Recipe, StepPlan
from meteor.train.protocol import Engine, all_reduce_sum


def held_out_loss(engine: Engine, table: SampleTable, recipe: Recipe, *, load_batches: LoadBatches) -> float:
    """Measure the mean cross-entropy of answer tokens, in nats, without the projector's auxiliary loss.

    Args:
        engine: engine at any step. All workers call this function together, and each takes its share of the samples.
        table: held-out samples; their order does not depend on the seed of the run.
        recipe: batch sizes and layout.
        load_batches: loader of this table's batches, see `meteor.train.loop.LoadBatches`.
    """
    plan = StepPlan(table, replace(recipe, epochs=1, seed=0), "held out")
    num_answer_tokens = sum(plan.num_answer_tokens(step) for step in plan.steps())
    coming = [rows for step in plan.steps() for rows in plan.micro_steps(step, engine.rank, engine.world_size)]
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    with closing(load_batches(coming)) as batches:
        for batch in batches:
            inputs = batch.to(engine.device).as_inputs()
            total += engine.evaluate(
                {**inputs, "num_items_in_batch": num_answer_tokens, "aux_loss_coefficient": 0.0}
            ).loss
    return float(all_reduce_sum(total))
