"""Fixtures that several rooms share: tiny models without training, a tokenizer of letters, batches, images, an S3."""

import functools
import io
import json
import os
import signal
import string
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Without a GPU Triton's kernels are interpreted. It reads this when it is imported, and torch may import it.
os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidiactl").exists() else "1")

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BatchFeature,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from meteor.data.collate import Batch, collate
from meteor.features import ImageFeatures
from meteor.image.budget import visual_token_budget
from meteor.model import MeteorConfig, MeteorForConditionalGeneration, MeteorImageProcessor, MeteorProcessor
from meteor.model.remote import FILE_NAME, SOURCE
from meteor.text.tokenizer import VisualTokens, load_tokenizer
from meteor.text.tokens import TokenisedSample

# A data set in every form; the real S3 server and the proxy before it, which benchmarks/faults.py starts too; eager towers.
sys.path.insert(0, str(Path(__file__).parent / "data"))
sys.path.insert(0, str(Path(__file__).parent / "s3"))
sys.path.insert(0, str(Path(__file__).parent / "vision"))
from ceph import ACCESS_KEY, INSTALL, SECRET_KEY, ceph_gateway, missing_programs

# On tensors this small threads wait for each other more than they compute: 6x slower on a busy machine.
torch.set_num_threads(1)
# The default of 200 ms an example measures the machine: an example of 3 ms took 530 ms beside other work.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
IDENTITY = {
    "encoder_digest": "0" * 64,
    "encoder_dtype": "float32",
    "select_layer": -2,
    "preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3, "rescale": "1/255"},
    "slicing": {"max_slices": 6, "resolution": 56, "patch_size": 14},
    "versions": {"slicing": 1, "resizing": 1, "encoding": 1},
}


def _shares_a_process(nodeid: str) -> str:
    """Name the tests that one process runs: those of a file; all of the pipelines, as they share a Ray session."""
    file = nodeid.partition("::")[0]
    return "pipelines" if file.startswith("tests/pipelines/") else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the pipelines first: they take longest."""
    items.sort(key=lambda item: _shares_a_process(item.nodeid) != "pipelines")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Schedule by `_shares_a_process`: xdist 3.8 finds no groups of `xdist_group` with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = _shares_a_process
    return scheduler


@pytest.fixture
def signals_as_in_a_terminal() -> Iterator[None]:
    """SIGINT and SIGHUP stop a command, even if the tests were started by `nohup` or in the background, which ignore them."""
    ours = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in ours.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., MeteorForConditionalGeneration]:
    def make(
        projector: dict | None = None,
        *,
        seed: int = 0,
        vision_tower: bool = False,
        text_sampler: dict | None = None,
        image_token_id: int = 32000,
        **text: object,
    ) -> MeteorForConditionalGeneration:
        torch.manual_seed(seed)
        config = MeteorConfig(
            text_config={"model_type": "llama", **TEXT, **text},
            vision_config=VISION,
            projector=projector or {"name": "meteor", "k": 4},
            cache_identity=IDENTITY,
            text_sampler=text_sampler,
            image_token_id=image_token_id,
        )
        return MeteorForConditionalGeneration(config, vision_tower=vision_tower)

    return make


@pytest.fixture(scope="session")
def make_features() -> Callable[..., ImageFeatures]:
    def make(key: str, *, sliced: bool = False, width: int = 16, seed: int = 0) -> ImageFeatures:
        generator = torch.Generator().manual_seed(seed)
        grids = ((2, 3), (3, 2), (3, 2)) if sliced else ((2, 4),)
        sizes = [rows * columns for rows, columns in grids]
        return ImageFeatures(
            image_key=key,
            width=100,
            height=80,
            grid=(2, 1) if sliced else None,
            patch_grids=grids,
            attention_layers=(-2,),
            features=[torch.randn(n, width, generator=generator) for n in sizes],
            cls_attention=[torch.rand(1, n, generator=generator) / n for n in sizes],
            cls=torch.randn(len(grids), width, generator=generator),
        )

    return make


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    def make(
        samples: list[tuple[TokenisedSample, list[ImageFeatures]]],
        projector: dict | None = None,
        *,
        rows: list[list[int]] | None = None,
        image_id: int = 32000,
        **options,
    ) -> Batch:
        """A sample a row; or ``rows`` of positions in ``samples``."""
        settings = dict(projector or {"name": "meteor", "k": 4})
        return collate(
            [[samples[i] for i in row] for row in rows or [[i] for i in range(len(samples))]],
            budget=visual_token_budget(settings.pop("name"), settings),
            visual_tokens=VisualTokens(image_id, slice_id=3, row_id=4),
            pad_id=0,
            vision_width=16,
            select_layer=-2,
            **options,
        )

    return make


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer of single characters, ids 0 to 56: <unk>, <s>, </s>, "," is 3, the newline is 4; <image> becomes 57."""
    characters = [",", "\n", " ", *".:'?!-", *string.ascii_lowercase, *string.digits, *"USERAITNH"]
    tokens = ["<unk>", "<s>", "</s>", *dict.fromkeys(characters)]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    folder = str(tmp_path_factory.mktemp("models") / "tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A vision tower of `make_model`'s shape with random weights."""
    torch.manual_seed(11)
    folder = tmp_path_factory.mktemp("models") / "clip"
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return str(folder)


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A language model of `make_model`'s shape with random weights."""
    torch.manual_seed(12)
    folder = str(tmp_path_factory.mktemp("models") / "llm")
    LlamaForCausalLM(LlamaConfig(**TEXT)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def finished_model(
    make_model: Callable[..., MeteorForConditionalGeneration],
    tokenizer_folder: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """A finished model with random weights, large enough to say different things."""
    model = make_model(vision_tower=True, image_token_id=57)
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter *= 4
    folder = str(tmp_path_factory.mktemp("finished") / "model")
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 2
    model.save_pretrained(folder)
    images = MeteorImageProcessor(resolution=56, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    MeteorProcessor(images, load_tokenizer(tokenizer_folder), model.config.projector).save_pretrained(folder)
    (Path(folder) / FILE_NAME).write_text(SOURCE)
    return folder


@pytest.fixture(scope="session")
def ask() -> Callable[..., BatchFeature]:
    """Inputs of one question, as a user of transformers prepares them."""

    def prepare(processor: MeteorProcessor, words: str, images: Sequence[Image.Image] = ()) -> BatchFeature:
        parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": words}]
        messages = [{"role": "user", "content": parts}]
        options = {"tokenize": True, "return_dict": True, "processor_kwargs": {"return_tensors": "pt"}}
        return processor.apply_chat_template(messages, add_generation_prompt=True, **options)

    return prepare


@pytest.fixture(scope="session")
def make_image() -> Callable[..., Image.Image]:
    """Noise of a size and mode."""

    def make(width: int, height: int, *, mode: str = "RGB", seed: int = 0) -> Image.Image:
        channels = len(mode)
        noise = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
        return Image.fromarray(noise, mode)

    return make


@pytest.fixture(scope="session")
def png() -> Callable[..., bytes]:
    """An image as the bytes of a PNG file."""

    def encode(image: Image.Image, **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", **options)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """moto, a mock of S3 on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def ceph_endpoint() -> Iterator[str]:
    """A real S3 server on loopback, Ceph's gateway; for tests marked ``s3``."""
    if missing := missing_programs():
        pytest.skip(f"{', '.join(missing)} not found; install Ceph (`make test-s3` does): {INSTALL}")
    with ceph_gateway() as endpoint:
        yield endpoint


@pytest.fixture
def s3_root(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A fresh prefix of a bucket of the mock, with the environment that leads to it."""
    return _bucket_root(s3_endpoint, monkeypatch, tmp_path)


@pytest.fixture
def ceph_root(ceph_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A fresh prefix of a bucket of the real server, with the environment that leads to it."""
    return _bucket_root(ceph_endpoint, monkeypatch, tmp_path)


def _bucket_root(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        # No settings of whoever runs the tests.
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
        # Set here so that what the code sets itself is taken back after the test.
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }.items():
        monkeypatch.setenv(name, value)
    _make_bucket(endpoint)
    return f"s3://bucket/{tmp_path.name}"


@functools.cache
def _make_bucket(endpoint: str) -> None:
    import boto3

    boto3.session.Session().client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="bucket")
