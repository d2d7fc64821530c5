"""Made-up runs, variants and panels for the report's tests."""

import numpy as np
import pytest
from PIL import Image

from meteor.image.slicing import plan_slices
from meteor.report import RunResult, SelectionPanel, SubImageScores
from meteor.runs.reading import StageRecord


@pytest.fixture(scope="session")
def make_run():
    def make(stage="pretrain", *, losses=(2.0, 1.0), finished=True, settings=None, **identity):
        metrics = [
            {
                "step": step,
                "loss": loss,
                "lr": 1e-3,
                "num_samples": 32,
                "num_visual_tokens": 3200,
                "num_text_tokens": 640,
                "seconds": 2.0,
            }
            for step, loss in enumerate(losses, start=1)
        ]
        summary = {"stage": stage, "seconds": 99.0} if finished else None
        return StageRecord(stage, f"runs/{stage}", settings or {}, summary, metrics, {"digest": "d1", **identity})

    return make


@pytest.fixture(scope="session")
def make_variant(make_run):
    def make(name="meteor", *, stages=None, scores=None, predictions=None, parameters=34_977_024, tokens=540.25):
        runs = {stage: make_run(stage) for stage in ("pretrain", "finetune", "evaluate")} if stages is None else stages
        return RunResult(name, runs, scores, predictions, parameters, tokens)

    return make


@pytest.fixture(scope="session")
def make_score():
    def make(share=0.5, *, num_questions=1200, majority=0.25, num_quarantined=0, by_type=None, **more):
        return {
            "metric": "exact_match",
            "metric_version": 1,
            "extra": {},
            "score": share,
            "interval": None if share is None else [share - 0.1, share + 0.1],
            "num_questions": num_questions,
            "majority_score": majority,
            "num_quarantined": num_quarantined,
            "by_type": by_type or {},
            **more,
        }

    return make


@pytest.fixture(scope="session")
def make_prediction():
    def make(
        id="q1", *, prediction="yes", answer="yes", score=1.0, quarantined=False, question="Is it?", image="a.png"
    ):
        return {
            "id": id,
            "question": question,
            "prediction": prediction,
            "answer": answer,
            "score": score,
            "quarantined": quarantined,
            "image": image,
        }

    return make


@pytest.fixture(scope="session")
def make_panel():
    def make(width=640, height=480, *, question="What is it?", num_kept=4, native=True):
        plan = plan_slices(width, height)
        generator = np.random.default_rng(0)
        sub_images = []
        for rows, columns in plan.patch_grids:
            scores = generator.random(rows * columns)
            sub_images.append(
                SubImageScores(scores / scores.sum(), np.arange(num_kept), scores, scores if native else None)
            )
        image = Image.fromarray(generator.integers(64, 255, (height, width, 3), dtype=np.uint8))
        return SelectionPanel("an image", question, "a cat", "a dog", image, plan, tuple(sub_images), "meteor")

    return make
