"""Vision towers of transformers behind one protocol: CLIP, SigLIP and SigLIP 2, DINOv2 and DINOv3."""

from meteor.vision.towers.protocol import Importance, Tower
from meteor.vision.towers.registry import build_tower, default_importance, model_class_of, require_supported, tower_of
from meteor.vision.towers.shape import TowerShape

__all__ = [
    "Importance",
    "Tower",
    "TowerShape",
    "build_tower",
    "default_importance",
    "model_class_of",
    "require_supported",
    "tower_of",
]
