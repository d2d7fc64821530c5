"""Projectors from cached patch features and class-token attention to visual tokens of the LLM's width."""

from meteor.projector.output import Projector, ProjectorOutput
from meteor.projector.registry import build_projector

__all__ = ["Projector", "ProjectorOutput", "build_projector"]
