"""Frozen vision encoder: patch features of a sub-image, and a row that tells how important each patch is.

Letters: P patches of a sub-image, C vision width, A requested attention layers, H heads, Q head width.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from meteor.constants import CLIP_MEAN, CLIP_STD
from meteor.errors import BadImageError, SettingsError
from meteor.pretrained import load_pretrained
from meteor.vision.checkpoint import EXAMPLE, read_preprocessing, read_vision_config
from meteor.vision.digest import weights_digest
from meteor.vision.importance import choose_importance
from meteor.vision.memory import max_tokens_for, split_evenly
from meteor.vision.packed import Packed, run_tower
from meteor.vision.runs import plan_runs
from meteor.vision.towers import Importance, Tower, model_class_of, tower_of
from meteor.vision.towers.protocol import Position

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class SubImageFeatures:
    """Encoder output for one sub-image.

    Attributes:
        features: patch tokens of the selected layer without class token and registers, (P, C), row-major in the patch grid.
        cls_attention: importance rows, mean over heads, (A, P) float32: softmax attention of the class token over the patches,
            or what `meteor.vision.towers.Importance` names. The class token's attention to itself is left out, so that its row
            sums to less than 1.
        cls: class token of the selected layer, (C,); the patches' mean if the tower has no class token.
        grid: patch rows and columns (Hu, Wu).
        finite: whether features and attention are finite; False is possible only with ``raise_bad=False``.
    """

    features: torch.Tensor
    cls_attention: torch.Tensor
    cls: torch.Tensor
    grid: tuple[int, int]
    finite: bool = True


class FrozenEncoder:
    """Vision tower that never trains; blocks after the last required block do not run.

    Args:
        model: the vision tower, a model of transformers that `meteor.vision.towers` supports.
        select_layer: index into ``hidden_states`` as in LLaVA; -2 is the output of the last block but one.
        attention_layers: indices into ``hidden_states``; the importance rows of the blocks that made these states are
            returned. The pooling query's row is read after the last block, whatever the layer.
        importance: kind of the importance row; the tower's own if None: the class token's, or the pooling query's.
        digest: fingerprint of the weights as stored, before any cast; computed from the model if None.
        mean, std: normalisation with which the tower was trained, per colour channel.
        max_tokens: most tokens in one pass; chosen by free memory if None (`meteor.vision.memory`).

    Raises:
        SettingsError: the tower does not have a requested layer or importance row, or is not supported.
    """

    def __init__(
        self,
        model: Any,
        *,
        select_layer: int = -2,
        attention_layers: Sequence[int] = (-2,),
        importance: Importance | None = None,
        digest: str | None = None,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        max_tokens: int | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self._tower: Tower = tower_of(model)
        self.importance = choose_importance(self._tower, importance)
        self.num_blocks: int = model.config.num_hidden_layers
        self.select_layer, self.attention_layers = select_layer, tuple(attention_layers)
        self._select_block = self._block_of(select_layer)
        self._attention_blocks = [self._block_of(layer) for layer in self.attention_layers]
        self.weights_digest = digest or weights_digest(model.state_dict())
        self.mean, self.std = tuple(mean), tuple(std)
        self.max_tokens = max_tokens
        self._positions: dict[tuple[Any, ...], Position] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        select_layer: int = -2,
        attention_layers: Sequence[int] = (-2,),
        importance: Importance | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        max_tokens: int | None = None,
    ) -> "FrozenEncoder":
        """Load the vision tower of a checkpoint in `.safetensors` or `.bin` format: the tower alone, or with a text tower.

        The digest is computed over the stored weights, before the cast to ``dtype``.

        Args:
            path: local directory, s3:// folder or hub id.
            select_layer: index into ``hidden_states``; -2 is the output of the last block but one.
            attention_layers: indices into ``hidden_states`` whose block's importance row is returned.
            importance: kind of the importance row; the tower's own if None.
            dtype: dtype of the weights; the stored dtype if None.
            device: device of the weights; the CPU if None.
            max_tokens: most tokens in one pass; chosen by free memory if None.

        Raises:
            SettingsError: there is no supported checkpoint at ``path``, or a layer or the importance row does not exist.
        """
        vision_config = read_vision_config(path)
        model = load_pretrained(
            model_class_of(vision_config),
            path,
            setting="vision.path",
            example=EXAMPLE,
            config=vision_config,
            dtype="auto",
            attn_implementation="sdpa",
        )
        digest = weights_digest(model.state_dict())
        preprocessing = read_preprocessing(path, vision_config)
        model = model.to(device=device, dtype=dtype)
        return cls(
            model,
            select_layer=select_layer,
            attention_layers=attention_layers,
            importance=importance,
            digest=digest,
            mean=preprocessing.mean,
            std=preprocessing.std,
            max_tokens=max_tokens,
        )

    @property
    def width(self) -> int:
        """Width of the patch features, C."""
        return self.model.config.hidden_size

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.model.config.patch_size

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Preprocessing of pixels as part of the cache key: rescale by 1/255, then normalise."""
        return {"rescale": "1/255", "mean": list(self.mean), "std": list(self.std)}

    def _block_of(self, layer: int) -> int:
        """Return the index, from 0, of the block that outputs ``hidden_states[layer]``."""
        block = (layer if layer >= 0 else self.num_blocks + 1 + layer) - 1
        if not 0 <= block < self.num_blocks:
            raise SettingsError(
                f"layer {layer} does not exist: the encoder has {self.num_blocks} blocks, "
                f"so layers are 1 ... {self.num_blocks} or -{self.num_blocks} ... -1"
            )
        return block

    @property
    def device(self) -> torch.device:
        """Device of the tower's weights."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the tower computes."""
        return self.model.dtype

    @torch.inference_mode()
    def encode(self, pixels: Sequence[torch.Tensor], *, raise_bad: bool = True) -> list[SubImageFeatures]:
        """Encode sub-images of any patch grids together, in chunks that fit into memory.

        Args:
            pixels: normalised float tensors (3, h, w) on any device, h and w multiples of the patch size.
            raise_bad: whether a result that is not finite raises an error; if False, its ``finite`` attribute is False.

        Returns:
            Features of each sub-image in the given order, on the encoder's device.

        Raises:
            BadImageError: an activation is not finite, and ``raise_bad`` is True.
            SettingsError: a side is not a multiple of the patch size.
        """
        grids = [self._grid(sub_image) for sub_image in pixels]
        # Sub-images of equal length, and of equal grids among them, become neighbours, as runs require.
        order = sorted(range(len(pixels)), key=lambda i: (grids[i][0] * grids[i][1], grids[i]))
        if self.max_tokens is None:
            self.max_tokens = max_tokens_for(self.model, self.device)
        num_tokens = [self._num_tokens(grid) for grid in grids]
        encoded = self._encode_chunks(pixels, split_evenly(order, num_tokens, self.max_tokens), grids)
        # A single synchronisation with the device for the whole batch.
        finite = torch.cat([chunk.finite for _, chunk in encoded]).tolist() if encoded else []
        if raise_bad and not all(finite):
            raise BadImageError(
                "non_finite_features",
                f"the encoder produced values that are not finite for {len(finite) - sum(finite)} of {len(finite)} sub-images",
            )
        results: dict[int, SubImageFeatures] = {}
        flags = iter(finite)
        for indices, chunk in encoded:
            results.update(zip(indices, self._unpack(chunk, flags), strict=True))
        return [results[i] for i in range(len(pixels))]

    def _encode_chunks(
        self, pixels: Sequence[torch.Tensor], chunks: Sequence[list[int]], grids: Sequence[tuple[int, int]]
    ) -> list[tuple[list[int], Packed]]:
        waiting, done = list(reversed(chunks)), []
        while waiting:
            chunk = waiting.pop()
            packed = self._run(pixels, chunk, grids)
            if packed is not None:
                done.append((chunk, packed))
                continue
            num_tokens = sum(self._num_tokens(grids[i]) for i in chunk)
            self.max_tokens = num_tokens // 2
            _LOG.warning(
                "%d tokens at once do not fit into the memory of %s; continuing with %d",
                num_tokens,
                self.device,
                self.max_tokens,
            )
            torch.cuda.empty_cache()
            waiting += [chunk[len(chunk) // 2 :], chunk[: len(chunk) // 2]]
        return done

    def _run(self, pixels: Sequence[torch.Tensor], chunk: list[int], grids: Sequence[tuple[int, int]]) -> Packed | None:
        """Run one chunk through the tower; return None if several sub-images exceed the device's memory."""
        runs = plan_runs([grids[i] for i in chunk], self._tower.num_prefix)
        try:
            return run_tower(
                self._tower,
                [pixels[i].to(self.device, non_blocking=True) for i in chunk],
                runs,
                positions=[self._position(run.grid) for run in runs],
                select_block=self._select_block,
                attention_blocks=self._attention_blocks,
                importance=self.importance,
            )
        except torch.OutOfMemoryError:
            if len(chunk) == 1:
                raise
        # Returned outside the handler, because the error's traceback keeps the attempt's tensors alive.
        return None

    def _grid(self, pixels: torch.Tensor) -> tuple[int, int]:
        height, width = pixels.shape[1:]
        if height % self.patch_size or width % self.patch_size:
            raise SettingsError(
                f"a sub-image of {height} x {width} pixels does not divide into {self.patch_size}-pixel patches"
            )
        return height // self.patch_size, width // self.patch_size

    def _num_tokens(self, grid: tuple[int, int]) -> int:
        return self._tower.num_prefix + grid[0] * grid[1]

    def _position(self, grid: tuple[int, int]) -> Position:
        """Return the positions of a grid, interpolated once per grid."""
        key = (*grid, self.device, self.dtype)
        if key not in self._positions:
            self._positions[key] = self._tower.position(grid)
        return self._positions[key]

    def _unpack(self, chunk: Packed, finite: Iterator[bool]) -> Iterator[SubImageFeatures]:
        num_prefix = self._tower.num_prefix
        for run, attention_NAP in zip(chunk.runs, chunk.attention, strict=True):
            for tokens_LC, attention_AP in zip(run.of(chunk.selected), attention_NAP, strict=True):
                if self._tower.has_class_token:
                    cls_C = tokens_LC[0]
                else:
                    cls_C = tokens_LC.mean(dim=0, dtype=torch.float32).to(tokens_LC.dtype)
                yield SubImageFeatures(tokens_LC[num_prefix:], attention_AP, cls_C, run.grid, next(finite))
