"""Loss of given answers for each variant of a finished study of elastic K: finer than scores, which need whole answers right.

python benchmarks/elastic.py --run demo_elastic
"""

import argparse
import math

import torch

from meteor.assembly import Inputs
from meteor.assembly.study import study_variants
from meteor.assembly.training_stage import find_model
from meteor.config import load_run, resolve_paths
from meteor.evaluation.answer import Answerer
from meteor.train.build import DTYPES
from pipelines import evaluate


def main() -> None:
    """Print the mean negative log-likelihood per answer token, in nats, of every variant's first to last seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, help="run file with a study whose variants have been trained")
    settings = resolve_paths(load_run(parser.parse_args().run))
    found: dict[str, list[float]] = {}
    for variant in study_variants(settings):
        found.setdefault(variant.name, []).append(measure(Inputs(variant.settings)))
    for name, losses in found.items():
        print(f"{name:<16} {sum(losses) / len(losses):.4f}  ({', '.join(f'{loss:.4f}' for loss in losses)})")


@torch.inference_mode()
def measure(inputs: Inputs) -> float:
    """Return the mean negative log-likelihood of the reference answers' tokens under a run's own token selection."""
    settings, cache = inputs.settings, inputs.cache()
    model_uri, _ = find_model(inputs)
    answerer = Answerer(model_uri, device="cpu", dtype=DTYPES[settings.llm.dtype])
    sets = evaluate.load_question_sets(inputs)
    total = count = 0.0
    for each in evaluate.find_questions(settings, sets, inputs.index(), cache):
        if each.reason:
            continue
        batch = answerer.batch([each.question], cache, with_answers=True, selection=each.selection)
        loss = float(answerer.model(**batch.as_inputs(), num_items_in_batch=1).loss)
        assert math.isfinite(loss), each.question.id
        total, count = total + loss, count + int((batch.labels[:, 1:] >= 0).sum())
    return total / count


if __name__ == "__main__":
    main()
