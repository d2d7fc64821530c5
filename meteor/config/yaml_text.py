"""YAML as run files are written: numbers like 2e-5, no key twice, and one error for whatever is wrong with a text."""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from meteor.errors import SettingsError
from meteor.formatting import shorten

_LONGEST_SHOWN = 80
_SURROGATE = re.compile("[\\ud800-\\udfff]")


class _Loader(yaml.SafeLoader):
    """Reads 2e-5 as a number, as YAML 1.2 does and people mean it; for YAML 1.1, which the parent reads, it is text.

    A key that comes twice is an error, as YAML demands; the parent keeps the last one in silence.
    """

    # Before `<<` is resolved, which puts keys into a mapping that it may hold already.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        # A run file has no keys that are lists or mappings; the parent refuses them later.
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, key in enumerate(keys):
            if key.value in (other.value for other in keys[:number]):
                raise yaml.composer.ComposerError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        # A month 13, a number of 5,000 digits, or a text with the tag of a number is no error of YAML's own tree.
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
            shown = shorten(repr(node.value), _LONGEST_SHOWN)
            raise yaml.constructor.ConstructorError(
                problem=f"{shown} cannot be read as {node.tag.rpartition(':')[2]}", problem_mark=node.start_mark
            ) from error


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("+-.0123456789")
)


def read_yaml(text: str, where: str) -> Any:
    """Parse YAML as run files are parsed.

    Args:
        text: the text.
        where: name of the text in the error.

    Raises:
        SettingsError: the text is not valid YAML, a key comes twice in a mapping, it is nested too deeply, or a value has a
            character that is none.
    """
    try:
        content = yaml.load(text, Loader=_Loader)
        if odd := next(_unusable_texts(content), None):
            raise SettingsError(f"{where}: {odd!r} contains a null character or half of a surrogate pair: remove it")
        return content
    except yaml.YAMLError as error:
        raise SettingsError(f"{where} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise SettingsError(f"{where} is nested too deeply") from error


def _unusable_texts(content: Any) -> Iterator[str]:
    """Yield texts that no file name can contain, and no file can store."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _unusable_texts(key)
            yield from _unusable_texts(value)
    elif isinstance(content, list):
        for value in content:
            yield from _unusable_texts(value)
    elif isinstance(content, str) and ("\0" in content or _SURROGATE.search(content)):
        yield content
