"""Token budgets: the most visual tokens per sub-image for each projector, from patch grids alone, without torch."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import floor

from meteor.errors import SettingsError
from meteor.image.elastic import token_counts, with_count

DEFAULT_SCALE_FACTOR = 2
# Sides of the cells of `focus` in patches, and the share of patches that become tokens.
DEFAULT_SCALES = (1, 2, 4)
DEFAULT_KEPT_SHARE = 0.5

PatchGrids = Sequence[tuple[int, int]]
Budget = Callable[[PatchGrids], list[int]]


def visual_token_budget(projector: str, settings: Mapping[str, object], *, k: int | None = None) -> Budget:
    """Return a projector's token budget, a function of an image's patch grids.

    Args:
        projector: name in the projector registry.
        settings: settings of the projector; settings that do not change the number of tokens are ignored.
        k: most tokens per sub-image; None for the largest number of training. Plans use the largest number.

    Returns:
        A picklable function from the patch grids of one image, ``[(Hu, Wu), ...]``, to the largest number of visual tokens
        of each sub-image, in the order of the grids. The number is exact for all projectors but ``focus`` and
        ``prumerge_plus``, which may make fewer tokens and mask the unused slots. A sub-image with a budget of 0 is left out
        of the batch.

    Raises:
        SettingsError: the projector does not exist, a setting is out of range, or the projector cannot make ``k`` tokens.
    """
    names = sorted(_BUDGETS.keys() | _BY_COUNT.keys())
    if projector not in names:
        raise SettingsError(f"no projector is called {projector!r}; the names known are {', '.join(names)}")
    counts = token_counts(projector, settings if k is None else with_count(projector, settings, k))
    return _BUDGETS[projector](settings) if counts is None else partial(_BY_COUNT[projector], k=counts.largest)


def _all_patches(settings: Mapping[str, object]) -> Budget:
    return _keep_all


def _only_global(settings: Mapping[str, object]) -> Budget:
    return _keep_global


def _square(default: int) -> Callable[[Mapping[str, object]], Budget]:
    def budget(settings: Mapping[str, object]) -> Budget:
        return partial(_make_k, k=_count(settings, "grid", default, "the side of the grid of tokens") ** 2)

    return budget


def _sum_of(*names_and_defaults: tuple[str, int]) -> Callable[[Mapping[str, object]], Budget]:
    def budget(settings: Mapping[str, object]) -> Budget:
        counts = [_count(settings, name, default, "a number of tokens") for name, default in names_and_defaults]
        return partial(_keep_at_most, k=sum(counts))

    return budget


def _share(settings: Mapping[str, object]) -> Budget:
    scales, share = settings.get("scales", DEFAULT_SCALES), settings.get("target_keep", DEFAULT_KEPT_SHARE)
    if not isinstance(scales, list | tuple) or not scales:
        raise SettingsError(f"the projector's scales is {scales!r}; give a list such as [1, 2, 4]")
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 <= share <= 1:
        raise SettingsError(f"the projector's target_keep is {share!r}; give a number from 0 to 1")
    finest, coarsest = (
        _count({"scales": scale}, "scales", 1, "a list such as [1, 2, 4]") for scale in (scales[0], scales[-1])
    )
    return partial(_keep_share, share=share, finest=finest, coarsest=coarsest)


def _scaled_map(settings: Mapping[str, object]) -> Budget:
    meaning = "by how much the sides of a map shrink"
    return partial(_shrink_sides, factor=_count(settings, "scale_factor", DEFAULT_SCALE_FACTOR, meaning))


def _count(settings: Mapping[str, object], name: str, default: int, meaning: str) -> int:
    value = settings.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SettingsError(f"the projector's {name} is {value!r}; give {meaning}, a whole number above 0")
    return value


def _keep_all(patch_grids: PatchGrids) -> list[int]:
    return [rows * columns for rows, columns in patch_grids]


def _keep_global(patch_grids: PatchGrids) -> list[int]:
    return [rows * columns if number == 0 else 0 for number, (rows, columns) in enumerate(patch_grids)]


def _keep_at_most(patch_grids: PatchGrids, *, k: int) -> list[int]:
    return [min(k, num_patches) for num_patches in _keep_all(patch_grids)]


def _make_k(patch_grids: PatchGrids, *, k: int) -> list[int]:
    """Give every sub-image k tokens, even if it has fewer patches, as projectors with learned queries do."""
    return [k for _ in patch_grids]


def _shrink_sides(patch_grids: PatchGrids, *, factor: int) -> list[int]:
    return [-(-rows // factor) * -(-columns // factor) for rows, columns in patch_grids]


def _keep_share(patch_grids: PatchGrids, *, share: float, finest: int, coarsest: int) -> list[int]:
    """Round the share of patches to whole tokens, between the numbers of the coarsest and of the finest cells."""
    least, most = (_shrink_sides(patch_grids, factor=factor) for factor in (coarsest, finest))
    wanted = [floor(share * num_patches + 0.5) for num_patches in _keep_all(patch_grids)]
    return [min(max(each), bound) for *each, bound in zip(wanted, least, most, strict=True)]


_BUDGETS: dict[str, Callable[[Mapping[str, object]], Budget]] = {
    "mlp": _all_patches,
    "global_view": _only_global,
    "pixel_shuffle": _scaled_map,
    "ldpv2": _square(12),
    "tokenpacker": _scaled_map,
    "c_abstractor": _square(12),
    "visionzip": _sum_of(("dominant", 108), ("contextual", 36)),
    "prumerge_plus": _sum_of(("max_tokens", 144)),
    "focus": _share,
}
# Projectors whose number of tokens is a number of `meteor.image.elastic`.
_BY_COUNT: dict[str, Callable[..., list[int]]] = {
    "avg_pool": _make_k,
    "resampler": _make_k,
    "visual_topk": _keep_at_most,
    "llava_mini": _make_k,
    "meteor": _keep_at_most,
    "meteor_37m": _keep_at_most,
}
