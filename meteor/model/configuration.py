"""Configuration of a finished model: its three parts, and the feature caches that fit it."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from meteor.model.remote import AUTO_MAP


class MeteorConfig(PretrainedConfig):
    """Configuration of `MeteorForConditionalGeneration`.

    Args:
        text_config: configuration of the language model.
        vision_config: configuration of the vision tower, of a type that `meteor.vision.towers` supports.
        projector: ``{"name": ..., **settings}``, arguments of `meteor.projector.build_projector`.
        select_layer: index of the tower's hidden state that the projector reads.
        cache_identity: `meteor.cache.CacheIdentity` as a dict; features from any other cache are refused.
        text_sampler: ``{"layer": ..., "keep": ...}``, arguments of `meteor.model.text_sampler.TextSampler`; None for no
            sampler.
        image_token_id: id of ``<image>`` in the prompt, at each visual slot.
    """

    model_type = "meteor"
    # Lets from_pretrained pass dtype and attn_implementation on to the parts.
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        vision_config: dict[str, Any] | PretrainedConfig | None = None,
        projector: dict[str, Any] | None = None,
        select_layer: int = -2,
        cache_identity: dict[str, Any] | None = None,
        text_sampler: dict[str, Any] | None = None,
        image_token_id: int = 32000,
        **kwargs: Any,
    ) -> None:
        self.text_config = _as_config(text_config, default="llama")
        self.vision_config = _as_config(vision_config, default="clip_vision_model")
        self.projector = dict(projector or {"name": "meteor"})
        self.select_layer = select_layer
        self.cache_identity = cache_identity
        self.text_sampler = text_sampler
        self.image_token_id = image_token_id
        super().__init__(**{"auto_map": AUTO_MAP["config"], **kwargs})

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """Return the language model's configuration, from which generation takes vocabulary and cache sizes."""
        return self.text_config


def _as_config(value: dict[str, Any] | PretrainedConfig | None, *, default: str) -> PretrainedConfig:
    if isinstance(value, PretrainedConfig):
        return value
    content = dict(value or {})
    model_type = content.pop("model_type", default)
    return AutoConfig.for_model(model_type, **content)


AutoConfig.register("meteor", MeteorConfig)
