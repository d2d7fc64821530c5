"""The file in a finished model's folder through which transformers finds this library (``trust_remote_code=True``)."""

FILE_NAME = "modeling_meteor.py"
_MODULE = FILE_NAME.removesuffix(".py")
# Values of the key ``auto_map`` in config.json, processor_config.json and preprocessor_config.json.
AUTO_MAP = {
    "config": {
        "AutoConfig": f"{_MODULE}.MeteorConfig",
        "AutoModelForImageTextToText": f"{_MODULE}.MeteorForConditionalGeneration",
    },
    "processor": {"AutoProcessor": f"{_MODULE}.MeteorProcessor"},
    "image_processor": {"AutoImageProcessor": f"{_MODULE}.MeteorImageProcessor"},
}
# transformers refuses to load a file whose imports fail, except those inside of try.
SOURCE = '''\
"""Loads the classes of this model from the package llava-meteor."""

try:
    from meteor.model import (
        MeteorConfig,
        MeteorForConditionalGeneration,
        MeteorImageProcessor,
        MeteorProcessor,
    )
except ImportError as error:
    raise ImportError(
        "This model needs the package llava-meteor, and it cannot be imported (" + str(error) + "). "
        "Install it: pip install llava-meteor, or pip install <folder of its source code>"
    ) from error

__all__ = ["MeteorConfig", "MeteorForConditionalGeneration", "MeteorImageProcessor", "MeteorProcessor"]
'''
