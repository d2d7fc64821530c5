"""How many visual tokens each projector makes of each sub-image at most, from patch grids alone (no torch here)."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from meteor.errors import SettingsError

DEFAULT_KEPT_TOKENS = 144

PatchGrids = Sequence[tuple[int, int]]
Budget = Callable[[PatchGrids], list[int]]


def visual_token_budget(projector: str, settings: Mapping[str, object]) -> Budget:
    """The token count of a projector as a function of an image's patch grids.

    Args:
        projector: its name, as in the projector registry.
        settings: the projector's own settings; those that do not change the count are ignored.

    Returns:
        A function, picklable, from the patch grids of one image, ``[(Hu, Wu), ...]``, to the largest number of visual
        tokens each of these sub-images can become, in the same order. Exact for the projectors below.

    Raises:
        SettingsError: no such projector, or a setting that makes no sense.
    """
    if projector not in _BUDGETS:
        raise SettingsError(f"no projector is called {projector!r}; the names known are {', '.join(sorted(_BUDGETS))}")
    return _BUDGETS[projector](settings)


def _all_patches(settings: Mapping[str, object]) -> Budget:
    return _keep_all


def _at_most_k(settings: Mapping[str, object]) -> Budget:
    k = settings.get("k", DEFAULT_KEPT_TOKENS)
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise SettingsError(f"the projector's k is {k!r}; give the tokens kept per sub-image, a whole number above 0")
    return partial(_keep_at_most, k=k)


def _keep_all(patch_grids: PatchGrids) -> list[int]:
    return [rows * columns for rows, columns in patch_grids]


def _keep_at_most(patch_grids: PatchGrids, *, k: int) -> list[int]:
    return [min(k, num_patches) for num_patches in _keep_all(patch_grids)]


_BUDGETS: dict[str, Callable[[Mapping[str, object]], Budget]] = {
    "mlp": _all_patches,
    "meteor": _at_most_k,
    "meteor_37m": _at_most_k,
}
