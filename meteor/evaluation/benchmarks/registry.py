"""Registry of benchmarks; a new benchmark needs a loader and an entry here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from typing import Protocol as Interface

from meteor.evaluation.benchmarks import annotators, documents, options, others
from meteor.evaluation.benchmarks.folder import Folder
from meteor.evaluation.benchmarks.prompts import Protocol
from meteor.evaluation.metrics import (
    ANLS,
    CIRCULAR,
    EXACT_MATCH,
    LETTER,
    MMMU_ACCURACY,
    POPE_F1,
    TRUE_FALSE,
    VQA_ACCURACY,
    Metric,
    judged,
    relaxed,
)
from meteor.evaluation.questions import LoadedQuestions, Question

# Most new tokens of an answer: a word or phrase, or a sentence that explains a choice.
SHORT = 16
LONG = 128


class Loader(Interface):
    """Function that reads a split's questions from a folder and asks them by a protocol."""

    def __call__(self, folder: Folder, *, split: str, protocol: Protocol) -> LoadedQuestions: ...


@dataclass(frozen=True)
class Benchmark:
    """Reading, prompts and scoring of a benchmark.

    Attributes:
        title: published name.
        load: loader of the questions; its docstring names the files.
        metric: metric of the answers.
        splits: splits that can be read; the first is the default.
        max_new_tokens: most tokens per answer.
        origin: place from which the files can be downloaded.
        in_folder: whether the images are beside the questions; otherwise they are under the run's image roots.
        has_ocr: whether the prompt can contain OCR tokens.
        export: function (folder, questions, answers by id) -> name and content of a file for scoring elsewhere.
        exported_splits: splits for which this file is written; all splits if empty.
        note: remark for readers of the scores; a changed note changes the set's digest (`QuestionSet.scoring_digest`).
    """

    title: str
    load: Loader
    metric: Metric
    splits: tuple[str, ...]
    max_new_tokens: int = SHORT
    origin: str = ""
    in_folder: bool = True
    has_ocr: bool = False
    export: Callable[[Folder, Sequence[Question], Mapping[str, str]], tuple[str, Any]] | None = None
    exported_splits: tuple[str, ...] = ()
    note: str = ""


_COCO = "http://images.cocodataset.org/zips"
BENCHMARKS: dict[str, Benchmark] = {
    "llava": Benchmark(
        "LLaVA's format",
        others.load_llava,
        EXACT_MATCH,
        ("",),
        max_new_tokens=32,
        origin="your own data",
        in_folder=False,
        export=others.answers_of_llava,
    ),
    "textvqa": Benchmark(
        "TextVQA",
        annotators.load_textvqa,
        VQA_ACCURACY,
        ("val",),
        origin="https://textvqa.org/dataset (annotations, Rosetta OCR tokens, train_val_images.zip)",
        has_ocr=True,
    ),
    "vqav2": Benchmark(
        "VQAv2",
        annotators.load_vqav2,
        VQA_ACCURACY,
        ("val", "test-dev", "test"),
        origin=f"https://visualqa.org/download.html ({_COCO}/val2014.zip, {_COCO}/test2015.zip)",
        export=annotators.submit_vqav2,
        exported_splits=("test-dev", "test"),
    ),
    "vizwiz": Benchmark(
        "VizWiz",
        annotators.load_vizwiz,
        VQA_ACCURACY,
        ("val", "test"),
        origin="https://vizwiz.org/tasks-and-datasets/vqa (Annotations.zip, val.zip, test.zip)",
        export=annotators.submit_vizwiz,
        exported_splits=("test",),
    ),
    "gqa": Benchmark(
        "GQA",
        documents.load_gqa,
        EXACT_MATCH,
        ("testdev_balanced", "val_balanced", "testdev_all", "val_all"),
        origin="https://cs.stanford.edu/people/dorarad/gqa/download.html (questions1.2.zip, images.zip)",
    ),
    "docvqa": Benchmark(
        "DocVQA",
        documents.load_docvqa,
        ANLS,
        ("val", "test"),
        max_new_tokens=32,
        origin="https://rrc.cvc.uab.es/?ch=17 (task 1: spdocvqa_qas.zip, spdocvqa_images.tar.gz)",
    ),
    "infovqa": Benchmark(
        "InfoVQA",
        documents.load_infovqa,
        ANLS,
        ("val", "test"),
        max_new_tokens=32,
        origin="https://rrc.cvc.uab.es/?ch=17 (task 3: infographicsvqa_qas.zip, infographicsvqa_images.tar.gz)",
    ),
    "chartqa": Benchmark(
        "ChartQA",
        documents.load_chartqa,
        relaxed(compat=True),
        ("test", "val"),
        max_new_tokens=32,
        origin="https://huggingface.co/datasets/ahmed-masry/ChartQA (ChartQA Dataset.zip)",
    ),
    "mmbench": Benchmark(
        "MMBench",
        options.load_mmbench,
        CIRCULAR,
        ("dev", "test"),
        origin="https://github.com/open-compass/MMBench (mmbench_dev_20230712.tsv)",
    ),
    "mmvet": Benchmark(
        "MM-Vet",
        others.load_mmvet,
        judged(None),
        ("",),
        max_new_tokens=LONG,
        origin="https://github.com/yuweihao/MM-Vet (mm-vet.zip)",
        export=others.answers_for_judge,
        note="scored by a judge model; those of the published scores are retired, so this one does not compare with theirs",
    ),
    "mmmu": Benchmark(
        "MMMU",
        options.load_mmmu,
        MMMU_ACCURACY,
        ("val", "dev"),
        max_new_tokens=LONG,
        origin="https://huggingface.co/datasets/MMMU/MMMU (one folder of Parquet files per subject)",
    ),
    "pope": Benchmark(
        "POPE",
        others.load_pope,
        POPE_F1,
        ("",),
        origin=f"https://github.com/AoiDragon/POPE (output/coco) and {_COCO}/val2014.zip",
    ),
    "seed": Benchmark(
        "SEED-Bench",
        options.load_seed,
        LETTER,
        ("image",),
        origin="https://huggingface.co/datasets/AILab-CVC/SEED-Bench (SEED-Bench.json, SEED-Bench-image.zip)",
        note="questions on images alone, not those on videos",
    ),
    "nlvr": Benchmark(
        "NLVR",
        others.load_nlvr,
        TRUE_FALSE,
        ("",),
        origin="https://lil.nlp.cornell.edu/nlvr, in LLaVA's format",
        in_folder=False,
    ),
}
