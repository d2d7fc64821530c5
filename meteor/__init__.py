"""LLaVA-Meteor's library: slicing, frozen encoder, feature cache, projectors, model, training, scoring; without Ray."""

__version__ = "0.1.0"
