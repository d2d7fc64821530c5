"""LLaVA-Meteor as a Hugging Face model: frozen vision tower, projector, language model."""

from meteor.model.configuration import MeteorConfig
from meteor.model.image_processing import MeteorImageProcessor
from meteor.model.modeling import MeteorForConditionalGeneration
from meteor.model.processing import MeteorProcessor

__all__ = ["MeteorConfig", "MeteorForConditionalGeneration", "MeteorImageProcessor", "MeteorProcessor"]
