"""`meteor cache`: what a feature cache holds, and whether it is intact."""

import argparse
import json
from typing import Any

from meteor.cache import FeatureCache


def add_commands(commands: Any) -> None:
    actions = commands.add_parser("cache", help="look into a feature cache").add_subparsers(required=True)
    for name, command, text in (
        ("show", _show, "identity, version, pictures, bytes"),
        ("quarantine", _quarantine, "the pictures that could not be encoded, with reasons"),
        ("verify", _verify, "read everything and compare every checksum"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("cache", metavar="URI", help="<root>/<key>/<codec>, as cache_features prints it")
        action.add_argument("--json", action="store_true", help="print JSON")
        action.set_defaults(command=command)


def _show(arguments: argparse.Namespace) -> int:
    cache = FeatureCache.open(arguments.cache)
    content = {
        "uri": cache.uri,
        "version": cache.version,
        "codec": cache.codec,
        "pictures": len(cache),
        "sub_images": cache.num_sub_images,
        "payload_bytes": cache.num_bytes,
        "quarantined": len(cache.quarantined()),
        "key": cache.identity.key,
        "identity": cache.identity.to_dict(),
    }
    if arguments.json:
        print(json.dumps(content, indent=2))
    else:
        print("\n".join(f"{name:<14} {value}" for name, value in content.items()))
    return 0


def _quarantine(arguments: argparse.Namespace) -> int:
    rows = FeatureCache.open(arguments.cache).quarantine()
    if arguments.json:
        print(json.dumps([vars(row) for row in rows], indent=2))
    else:
        print("\n".join(f"{row.reason:<16} {row.name or row.image_key}  {row.message}" for row in rows) or "none")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    cache = FeatureCache.open(arguments.cache)
    problems = cache.verify()
    if arguments.json:
        print(json.dumps({"pictures": len(cache), "problems": problems}, indent=2))
    else:
        print("\n".join(problems) or f"{len(cache)} pictures intact")
    return 1 if problems else 0
