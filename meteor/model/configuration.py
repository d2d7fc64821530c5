"""Configuration of a finished model: three parts, and which feature caches it may read."""

from typing import Any

from transformers import AutoConfig, CLIPVisionConfig, PretrainedConfig

from meteor.constants import IMAGE_TOKEN_ID


class MeteorConfig(PretrainedConfig):
    """What `MeteorForConditionalGeneration` is built from.

    Args:
        text_config: the language model's.
        vision_config: the CLIP vision tower's.
        projector: ``{"name": ..., **settings}`` of `meteor.projector.build_projector`.
        select_layer: hidden state of the tower that the projector reads.
        cache_identity: `meteor.cache.CacheIdentity` as a dict: features from any other cache are refused.
        text_sampler: ``{"layer": ..., "keep": ...}`` of `meteor.model.text_sampler.TextSampler`; None for none.
    """

    model_type = "meteor"
    # Lets from_pretrained pass dtype and attn_implementation on to the parts.
    sub_configs = {"text_config": AutoConfig, "vision_config": CLIPVisionConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        vision_config: dict[str, Any] | PretrainedConfig | None = None,
        projector: dict[str, Any] | None = None,
        select_layer: int = -2,
        cache_identity: dict[str, Any] | None = None,
        text_sampler: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.text_config = _as_config(text_config, default="llama")
        self.vision_config = _as_config(vision_config, default="clip_vision_model")
        self.projector = dict(projector or {"name": "meteor"})
        self.select_layer = select_layer
        self.cache_identity = cache_identity
        self.text_sampler = text_sampler
        self.image_token_id = IMAGE_TOKEN_ID
        super().__init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """Generation asks for this one's vocabulary and cache sizes."""
        return self.text_config


def _as_config(value: dict[str, Any] | PretrainedConfig | None, *, default: str) -> PretrainedConfig:
    if isinstance(value, PretrainedConfig):
        return value
    content = dict(value or {})
    model_type = content.pop("model_type", default)
    if model_type == "clip_vision_model":
        return CLIPVisionConfig(**content)
    return AutoConfig.for_model(model_type, **content)


AutoConfig.register("meteor", MeteorConfig)
