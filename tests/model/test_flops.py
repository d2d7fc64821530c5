"""FLOPs of answers against the operations that torch counts."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from meteor.model.flops import AnswerFlops


def test_a_prompt_and_the_tokens_after_it_cost_what_torch_counts(make_model):
    """Grouped queries, and heads that together are wider than the model."""
    shape = {"num_key_value_heads": 2, "head_dim": 16}
    llm = make_model({"name": "mlp"}, hidden_size=48, intermediate_size=80, num_hidden_layers=3, **shape).language_model
    llm.set_attn_implementation("eager")
    flops, length, num_new = AnswerFlops.of(llm), 50, 4
    ids = torch.ones(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = llm(ids, use_cache=True, logits_to_keep=1)
    # Eager attention computes the half above the diagonal too.
    assert counter.get_total_flops() == flops.prompt(length) + flops.per_pair * length * (length - 1) // 2
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for _ in range(num_new - 1):
            output = llm(ids[:, :1], past_key_values=output.past_key_values, use_cache=True)
    assert counter.get_total_flops() == flops.later_tokens(length, num_new)
