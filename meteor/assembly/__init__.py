"""Assembly: a run's settings become plain arguments of the folders below, and each file that settings name is read once."""

from meteor.assembly.encoders import cache_identity, load_encoder
from meteor.assembly.inputs import Inputs
from meteor.assembly.places import SampleFile, cache_uri, index_uri, pixel_settings, sample_files, training_files
from meteor.assembly.recipe import make_lora, make_recipe

__all__ = [
    "Inputs",
    "SampleFile",
    "cache_identity",
    "cache_uri",
    "index_uri",
    "load_encoder",
    "make_lora",
    "make_recipe",
    "pixel_settings",
    "sample_files",
    "training_files",
]
