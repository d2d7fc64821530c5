"""The loss of samples that are not trained on, by which the best checkpoint is kept."""

from contextlib import closing
from dataclasses import replace

import torch

from meteor.data.table import SampleTable
from meteor.train.loop import LoadBatches
from meteor.train.plan import Recipe, StepPlan
from meteor.train.protocol import Engine, all_reduce_sum


def held_out_loss(engine: Engine, table: SampleTable, recipe: Recipe, *, load_batches: LoadBatches) -> float:
    """Mean cross-entropy of the answer tokens, in nats; the projector's own loss is not in it.

    Args:
        engine: at any step. All workers call this together, each takes its share of the samples.
        table: the samples; they come in one order, whatever the seed of the run.
        recipe: how samples are put into batches.
        load_batches: as for `meteor.train.loop.train`, of this table.
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
