"""FocusLLaVA-style text-guided sampler: a middle layer drops visual tokens that the question does not attend to.

The sampler works through hooks on the layers of any transformers decoder with Llama's parts. Masks, caches and generation
remain transformers' own code.

Letters: B rows, L sequence, K kept tokens, M all tokens of a batch, T tokens of questions, H heads, d head width, D LLM
width.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from meteor.errors import SettingsError
from meteor.model.attention import attention_window


@dataclass(frozen=True)
class TokenGroups:
    """Sample, turn and image of each token of a pass, as numbers that are unique in the batch.

    Attributes:
        sample: number of the token's sample, (B, L) long; 0 at padding and at unused visual slots.
        turn: number of the token's turn, (B, L) long, at visual tokens and at the words after them in their turn; 0
            elsewhere.
        image: number of the token's image, (B, L) long, at visual tokens; 0 elsewhere.
    """

    sample: torch.Tensor
    turn: torch.Tensor
    image: torch.Tensor

    @classmethod
    def of(cls, sample_BL: torch.Tensor, turns_BL: torch.Tensor, images_BL: torch.Tensor) -> "TokenGroups":
        """Make numbers unique that restart in each row (samples) or in each sample (turns, images)."""
        row_B1 = torch.arange(len(sample_BL), device=sample_BL.device).unsqueeze(1)
        sample = torch.where(sample_BL > 0, row_B1 * (sample_BL.max() + 1) + sample_BL, 0)
        turn, image = (
            torch.where((sample > 0) & (number > 0), sample * (number.max() + 1) + number, 0)
            for number in (turns_BL, images_BL)
        )
        return cls(sample, turn, image)

    def map(self, change: Any) -> "TokenGroups":
        return TokenGroups(change(self.sample), change(self.turn), change(self.image))


@dataclass(frozen=True)
class _Plan:
    """Tokens that the later layers see.

    Attributes:
        index_BK: kept tokens in order, (B, K) long; any token at slots that are not kept.
        kept_BK: mask of slots, (B, K) bool.
        length: length of the whole sequence, L.
        sample_BK: sample number of each slot's token, (B, K) long.
    """

    index_BK: torch.Tensor
    kept_BK: torch.Tensor
    length: int
    sample_BK: torch.Tensor


class TextSampler:
    """Hooks that shorten a language model's sequence (FocusLLaVA's "text-guided sampler", arXiv 2411.14228).

    At layer ``layer`` each image keeps its ceil(keep x n) most important of n visual tokens. Later layers see these and all
    text, at their original positions, so they process fewer tokens in training, in a prompt's pass and in the cache. An
    image without words after it in its turn keeps all tokens. The paper does not define importance; `importance` is our
    choice.

    Args:
        language_model: causal LM of transformers; its layers get hooks.
        layer: index, from 0, of the layer whose attention ranks the tokens, and the last layer to see all of them; not
            the model's last layer.
        keep: share of an image's tokens to keep, above 0 and at most 1.

    Raises:
        SettingsError: the layer does not exist, or the model is not built like Llama.
    """

    def __init__(self, language_model: Any, *, layer: int, keep: float) -> None:
        decoder = language_model.base_model
        layers, norm = getattr(decoder, "layers", None), getattr(decoder, "norm", None)
        if layers is None or norm is None or not hasattr(getattr(layers[0], "self_attn", None), "q_proj"):
            raise SettingsError(
                f"text_sampler needs a language model built like Llama (layers, self_attn.q_proj, norm), and "
                f"{type(language_model).__name__} is not"
            )
        if not 0 <= layer < len(layers) - 1:
            raise SettingsError(
                f"text_sampler.layer={layer}: the language model has {len(layers)} layers, and at least one of them must "
                f"come after the sampler: give 0 to {len(layers) - 2}"
            )
        self.layer, self.keep = layer, keep
        self._config = language_model.config
        self._groups: TokenGroups | None = None
        self._plan: _Plan | None = None
        layers[layer].register_forward_pre_hook(self._choose, with_kwargs=True)
        for later in layers[layer + 1 :]:
            later.register_forward_pre_hook(self._shorten, with_kwargs=True)
        norm.register_forward_pre_hook(self._restore)

    def begin(self, groups: TokenGroups | None) -> None:
        """Prepare for a pass over whole sequences or for generation from a prompt; ``groups`` is None for text alone."""
        self._groups, self._plan = groups, None

    @property
    def kept(self) -> torch.Tensor | None:
        """Mask of the last pass, (B, L) bool, False at tokens that the later layers did not see; None before a pass."""
        if self._plan is None:
            return None
        kept_BL = torch.zeros(len(self._plan.index_BK), self._plan.length, dtype=torch.bool)
        rows, places = self._plan.kept_BK.nonzero(as_tuple=True)
        kept_BL[rows.cpu(), self._plan.index_BK[rows, places].cpu()] = True
        return kept_BL

    def _choose(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Choose the kept tokens before the ranking layer runs.

        With gradient checkpointing the layer runs again in the backward pass; the first choice then stays.
        """
        hidden = _hidden(args, kwargs)
        if self._groups is None or self._plan is not None or hidden.shape[1] != self._groups.sample.shape[1]:
            return
        self._check_window(self._groups)
        score_BL = importance(layer, hidden, kwargs["position_embeddings"], self._groups)
        self._plan = _plan(choose_kept(score_BL, self._groups, self.keep), self._groups.sample)

    def _check_window(self, groups: TokenGroups) -> None:
        """Refuse samples that the model would see through a window, which the shortened layers' masks do not have."""
        window, samples = attention_window(self._config), groups.sample[groups.sample > 0]
        longest = int(samples.unique(return_counts=True)[1].max()) if len(samples) else 0
        if window is not None and longest > window:
            raise SettingsError(
                f"text_sampler: a sample has {longest} tokens, but the language model attends within {window}: lower max_length"
            )

    def _shorten(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give a later layer the kept tokens alone, with their positions and a mask of their own."""
        plan = self._plan
        if plan is None:
            return None
        hidden, cache = _hidden(args, kwargs), kwargs.get("past_key_values")
        kwargs = dict(kwargs)
        is_answer = cache is not None and cache.get_seq_length(layer.self_attn.layer_idx) > 0
        if is_answer:
            kwargs["attention_mask"] = self._answer_mask(plan, layer, cache, hidden)
            return (hidden, *args[1:]), _without_hidden(kwargs)
        if hidden.shape[1] == plan.length:
            hidden = _take(hidden, plan.index_BK)
        kwargs["position_embeddings"] = tuple(
            _take(waves.expand(len(plan.index_BK), -1, -1), plan.index_BK) for waves in kwargs["position_embeddings"]
        )
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"].expand(len(plan.index_BK), -1).gather(1, plan.index_BK)
        if kwargs.get("cu_seq_lens_q") is not None:
            kwargs.update(_lengths(plan))
        else:
            kwargs["attention_mask"] = self._mask(plan, hidden.dtype)
        return (hidden, *args[1:]), _without_hidden(kwargs)

    def _restore(self, norm: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor] | None:
        """Put the tokens back at their places after the last layer; dropped tokens are zeros, and none has a label."""
        plan, [hidden] = self._plan, args
        if plan is None or hidden.shape[1] != plan.index_BK.shape[1] or plan.length == hidden.shape[1]:
            return None
        full = hidden.new_zeros(len(hidden), plan.length, hidden.shape[-1])
        rows, places = plan.kept_BK.nonzero(as_tuple=True)
        return (full.index_put((rows, plan.index_BK[rows, places]), hidden[rows, places]),)

    def _mask(self, plan: _Plan, dtype: torch.dtype) -> torch.Tensor:
        """Build a block mask, (B, 1, K, K), like `meteor.model.attention.Layout.mask`: padding sees padding."""
        sample_BK = torch.where(plan.kept_BK, plan.sample_BK, 0)
        same = (sample_BK[:, :, None] == sample_BK[:, None, :]).tril().unsqueeze(1)
        return self._as_wanted(same, dtype)

    def _answer_mask(self, plan: _Plan, layer: Any, cache: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Build the mask of new answer tokens, (B, 1, new, K + answered + new), over kept prompt tokens and the answer."""
        num_new = hidden.shape[1]
        num_before = cache.get_seq_length(layer.self_attn.layer_idx) - plan.kept_BK.shape[1]
        prompt = (plan.kept_BK & (plan.sample_BK > 0))[:, None, None, :].expand(-1, 1, num_new, -1)
        answer = torch.ones(num_new, num_before + num_new, dtype=torch.bool, device=hidden.device).tril(num_before)
        return self._as_wanted(torch.cat([prompt, answer.expand(len(hidden), 1, -1, -1)], dim=-1), hidden.dtype)

    def _as_wanted(self, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self._config._attn_implementation != "eager":
            return mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


@torch.no_grad()
def importance(
    layer: Any, hidden: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], groups: TokenGroups
) -> torch.Tensor:
    """Measure how much the words after an image, in its own turn, attend to each visual token in a layer.

    Importance is the attention of the layer's heads (softmax over all tokens that a word sees), averaged over heads and
    words. Words before an image cannot attend to it. Later turns are ignored, so that the choice does not depend on them.
    Only the words' rows of the attention are computed.

    Args:
        layer: decoder layer with Llama's parts.
        hidden: input of the layer, (B, L, D).
        position_embeddings: cosine and sine of the rotary embedding, each (B or 1, L, d).
        groups: sample, turn and image of each token.

    Returns:
        Importance of each visual token, (B, L) float32; 0 at other tokens, NaN if no words follow in the turn.
    """
    attention = layer.self_attn
    num_rows, length = hidden.shape[:2]
    sample_M, turn_M, image_M = groups.sample.flatten(), groups.turn.flatten(), groups.image.flatten()
    word_T = ((turn_M > 0) & (image_M == 0) & (sample_M > 0)).nonzero().squeeze(-1)
    # Under ZeRO-3 using a weight is a collective operation: every rank must do so, even a rank without questions.
    normed_MD = layer.input_layernorm(hidden).flatten(0, 1)
    cos_Md, sin_Md = (waves.expand(num_rows, -1, -1).flatten(0, 1) for waves in position_embeddings)
    query_T = word_T if len(word_T) else word_T.new_zeros(1)
    query_THd = _rotated(attention, attention.q_proj, "q_norm", normed_MD[query_T], cos_Md[query_T], sin_Md[query_T])
    key_MHd = _rotated(attention, attention.k_proj, "k_norm", normed_MD, cos_Md, sin_Md)
    score_M = torch.where(image_M > 0, torch.nan, 0.0).to(hidden.device)
    for turn in turn_M[word_T].unique().tolist():
        words_t = turn_M[word_T] == turn
        place_t = word_T[words_t]
        context_c = (sample_M == sample_M[place_t[0]]).nonzero().squeeze(-1)
        share_c = _attention(query_THd[words_t], key_MHd[context_c], place_t[:, None] >= context_c).mean(dim=(0, 1))
        of_turn_c = (turn_M[context_c] == turn) & (image_M[context_c] > 0)
        score_M[context_c[of_turn_c]] = share_c[of_turn_c]
    return score_M.view(num_rows, length)


def choose_kept(score_BL: torch.Tensor, groups: TokenGroups, keep: float) -> torch.Tensor:
    """Keep the ceil(keep x n) highest scores of each image's n tokens, and all other tokens; ties go to the earlier.

    Args:
        score_BL: importance of each visual token, (B, L); tokens with NaN are kept.
        groups: sample, turn and image of each token.
        keep: share of an image's tokens to keep.

    Returns:
        Mask of kept tokens, (B, L) bool; False at padding and unused slots too.
    """
    score_M, image_M = score_BL.flatten(), groups.image.flatten()
    kept_M = (groups.sample > 0).flatten()
    token_N = ((image_M > 0) & ~score_M.isnan() & kept_M).nonzero().squeeze(-1)
    # Two stable sorts order the tokens by image, and by score within an image.
    token_N = token_N[score_M[token_N].sort(descending=True, stable=True).indices]
    token_N = token_N[image_M[token_N].sort(stable=True).indices]
    _, count_p = torch.unique_consecutive(image_M[token_N], return_counts=True)
    first_N = (count_p.cumsum(0) - count_p).repeat_interleave(count_p)
    # The small subtraction absorbs float error: 100 x 0.07 is 7.000000000000001 and must give 7 tokens, not 8.
    most_N = (count_p.double() * keep - 1e-9).ceil().long().repeat_interleave(count_p)
    rank_N = torch.arange(len(token_N), device=token_N.device) - first_N
    kept_M[token_N[rank_N >= most_N]] = False
    return kept_M.view_as(score_BL)


def _plan(kept_BL: torch.Tensor, sample_BL: torch.Tensor) -> _Plan:
    """Arrange the kept tokens in rows of equal length K, the largest number that a row keeps."""
    num_kept = int(kept_BL.sum(dim=1).max())
    # A row that keeps all tokens sets the length for all rows; in the others, dropped tokens are masked.
    if num_kept == kept_BL.shape[1]:
        places_BL = torch.arange(num_kept, device=kept_BL.device).expand_as(kept_BL)
        return _Plan(places_BL, kept_BL, num_kept, sample_BL)
    # The kept tokens are moved to the end, so that padding is on the left, as generation from a prompt requires.
    index_BK = kept_BL.to(torch.uint8).sort(dim=1, stable=True).indices[:, kept_BL.shape[1] - num_kept :]
    return _Plan(index_BK, kept_BL.gather(1, index_BK), kept_BL.shape[1], sample_BL.gather(1, index_BK))


def _lengths(plan: _Plan) -> dict[str, Any]:
    """Return the lengths of the shortened samples as arguments of attention over one long row without padding."""
    _, counts = torch.unique_consecutive(plan.sample_BK[0], return_counts=True)
    bounds = nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(counts.max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def _rotated(
    attention: Any, project: Any, norm: str, row_TD: torch.Tensor, cos_Td: torch.Tensor, sin_Td: torch.Tensor
) -> torch.Tensor:
    """Project rows to the layer's queries or keys with rotary positions, (T, H, d)."""
    head_THd = project(row_TD).unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, norm):
        head_THd = getattr(attention, norm)(head_THd)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    head_1HTd = head_THd.transpose(0, 1).unsqueeze(0)
    return rotate(head_1HTd, head_1HTd, cos_Td.unsqueeze(0), sin_Td.unsqueeze(0))[0][0].transpose(0, 1)


def _attention(query_tHd: torch.Tensor, key_cHd: torch.Tensor, seen_tc: torch.Tensor) -> torch.Tensor:
    """Return the softmax of words over the tokens they see, (H, t, c) float32; query heads may share keys."""
    key_cHd = key_cHd.repeat_interleave(query_tHd.shape[1] // key_cHd.shape[1], dim=1)
    logit_Htc = torch.einsum("thd,chd->htc", query_tHd.float(), key_cHd.float()) / query_tHd.shape[-1] ** 0.5
    return logit_Htc.masked_fill(~seen_tc, -torch.inf).softmax(dim=-1)


def _take(value_BLX: torch.Tensor, index_BK: torch.Tensor) -> torch.Tensor:
    return value_BLX.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, value_BLX.shape[-1]))


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _without_hidden(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "hidden_states"}
