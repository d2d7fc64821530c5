"""Images projected in batches are what each of their sub-images gives alone."""

import pytest
import torch

from meteor.errors import DataError
from meteor.evaluation.projected import project_images

SETTINGS = [
    {"name": "meteor", "k": 3, "experts": "native"},
    {"name": "meteor_37m", "k": 3, "visual_weight": 0.3},
    {"name": "mlp"},
    {"name": "resampler"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings["name"])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_a_batch_of_several_images_gives_what_each_sub_image_gives_alone(make_cache, trained, settings, batch_size):
    model, projector = trained(settings)
    cache = make_cache()
    images = [cache.get(key) for key in cache.keys()]  # noqa: SIM118
    shown_images = list(project_images(projector, images, batch_size=batch_size))
    assert [shown.image_key for shown in shown_images] == cache.keys()
    for shown, image in zip(shown_images, images, strict=True):
        assert (shown.grid, shown.patch_grids) == (image.grid, image.patch_grids)
        assert len(shown.sub_images) == image.num_sub_images
        for i, part in enumerate(shown.sub_images):
            grid = torch.tensor(image.patch_grids[i : i + 1])
            with torch.no_grad():
                truth = model.projector(image.features[i][None], image.cls_attention[i][:1], grid)
            torch.testing.assert_close(part.tokens, truth.tokens[0], rtol=1e-5, atol=1e-6)
            for name in ("indices", "visual_scores", "native_scores"):
                values, wanted = getattr(part, name), getattr(truth, name)
                assert (values is None) == (wanted is None)
                if wanted is not None:
                    torch.testing.assert_close(values, wanted[0], rtol=1e-5, atol=1e-6)


def test_images_are_pulled_as_they_are_needed(make_features, trained):
    pulled = []

    def endless():
        while True:
            pulled.append(len(pulled))
            yield make_features("a" * 64)

    shown_images = project_images(trained()[1], endless(), batch_size=2)
    next(shown_images)
    assert len(pulled) == 2


def test_tokens_that_are_not_finite_are_refused_naming_the_image(make_features, trained):
    _, projector = trained({"name": "mlp"}, dtype=torch.float16)
    projector.module.mlp[2].weight.fill_(60000)
    projector.module.mlp[0].bias.fill_(100)
    with pytest.raises(DataError, match=f"image {'a' * 64}: its tokens are not finite in torch.float16; use bfloat16"):
        list(project_images(projector, [make_features("a" * 64)]))
