"""`meteor cache`: show, check, compare, clean, convert and plan feature caches."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from meteor import storage
from meteor.assembly import Inputs
from meteor.assembly.cache_audit import audit_run
from meteor.cache import CODEC_NAMES, FeatureCache, pins, unpin
from meteor.cache.upkeep import (
    diff_caches,
    list_caches,
    plan_gc,
    repair,
    run_gc,
    transcode,
)
from meteor.cli.options import CACHE_HELP, add_json, show_progress
from meteor.command_line import add_run, read_run
from meteor.formatting import flatten
from meteor.planning.cache_cost import NUM_RUNS, USD_PER_GB
from meteor.planning.survey import estimate_cache

_SECONDS_PER_HOUR = 3600


def add_commands(commands: Any) -> None:
    actions = commands.add_parser("cache", help="plan, show, check, clean and convert feature caches")
    add = _adder(actions.add_subparsers(required=True, metavar="ACTION"))
    listing = add("ls", _ls, "list all caches below a root folder")
    listing.add_argument("root", metavar="ROOT", help="the setting cache.uri of a run, by default <output>/cache")
    add("show", _show, "show identity, version, images, bytes, codec error, and the runs that read a cache", "cache")
    add("quarantine", _quarantine, "list the images that could not be encoded, with reasons", "cache")
    verify = add(
        "verify", _verify, "read a whole cache and compare every checksum; exit status 1 if it is damaged", "cache"
    )
    verify.add_argument(
        "--repair",
        action="store_true",
        help="publish a version without the damaged images; the next build encodes them again",
    )
    diff = add(
        "diff", _diff, "compare two caches: fields of the key, and images; exit status 1 if they differ", "cache"
    )
    diff.add_argument("other", metavar="OTHER", help="the cache to compare with")
    clean = add("gc", _gc, "list, or delete with --delete, the files that no kept version needs", "cache")
    clean.add_argument("--delete", action="store_true", help="delete the files; without it nothing is changed")
    clean.add_argument(
        "--older-than",
        type=_hours,
        default=24,
        metavar="HOURS",
        help="spare younger files, by the clock of the store (default: %(default)s)",
    )
    clean.add_argument(
        "--unpin",
        action="append",
        default=[],
        metavar="RUN",
        help="digest of a run that will not be resumed; repeatable",
    )
    convert = add("transcode", _transcode, "convert a cache to another codec, without the encoder", "cache")
    convert.add_argument("--codec", required=True, choices=CODEC_NAMES)
    plan = add("plan", _plan, "estimate images, bytes, encoder time, storage cost, and the work that a cache saves")
    add_run(plan)
    plan.add_argument("--rate", type=float, metavar="N", help="sub-images per second that all GPUs together encode")
    plan.add_argument(
        "--usd-per-gb",
        type=float,
        default=USD_PER_GB,
        metavar="USD",
        help="price of storing a gigabyte for a month (default: %(default)s)",
    )
    plan.add_argument(
        "--num-runs", type=int, default=NUM_RUNS, metavar="N", help="number of training runs (default: %(default)s)"
    )
    audit = add("audit", _audit, "encode some images again and compare; exit status 1 if they differ")
    add_run(audit)
    audit.add_argument("--images", type=int, default=32, metavar="N", help="number of images (default: %(default)s)")
    audit.add_argument(
        "--tolerance", type=float, default=0.02, metavar="E", help="largest relative error (default: %(default)s)"
    )
    audit.add_argument("--seed", type=int, default=0, help="seed of the choice of images (default: %(default)s)")
    audit.add_argument("--device", default=None, help="torch device that encodes, for example cuda (default: cpu)")


def _adder(actions: Any) -> Callable[..., argparse.ArgumentParser]:
    def add(name: str, command: Callable[[argparse.Namespace], int], text: str, *cache: str) -> argparse.ArgumentParser:
        parser = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        for argument in cache:
            parser.add_argument(argument, metavar="CACHE", help=CACHE_HELP)
        add_json(parser)
        parser.set_defaults(command=command)
        return parser

    return add


def _print(arguments: argparse.Namespace, content: Any, text: str) -> None:
    print(json.dumps(content, indent=2) if arguments.json else text)


def _lines(content: Mapping[str, Any]) -> str:
    """Return aligned lines; nested values have dotted names."""
    flat = flatten(content)
    width = max(map(len, flat))
    return "\n".join(f"{name:<{width}}  {_value(value)}" for name, value in flat.items())


def _value(value: Any) -> str:
    return format(value, ".6g" if abs(value) < 1e6 else ".0f") if isinstance(value, float) else str(value)


def _ls(arguments: argparse.Namespace) -> int:
    listings = list_caches(storage.absolute(arguments.root))
    text = "\n".join(listing.to_text() for listing in listings) or f"no caches below {arguments.root}"
    _print(arguments, [listing.to_dict() for listing in listings], text)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    cache = FeatureCache.open(arguments.cache)
    content: dict[str, Any] = {
        "uri": cache.uri,
        "version": cache.version,
        "codec": cache.codec,
        "images": len(cache),
        "sub_images": cache.num_sub_images,
        "payload_bytes": cache.num_bytes,
        "shadowed_rows": cache.manifest.num_shadowed,
        "quarantined": len(cache.quarantined()),
        "codec_error": cache.codec_error(),
        "runs": pins(cache.uri),
        "key": cache.identity.key,
        "identity": cache.identity.to_dict(),
    }
    _print(arguments, content, _lines(content | {"runs": dict(enumerate(content["runs"]))}))
    return 0


def _quarantine(arguments: argparse.Namespace) -> int:
    rows = FeatureCache.open(arguments.cache).quarantine()
    lines = [f"{row.reason:<16} {row.name or row.uri or row.image_key}  {row.message}" for row in rows]
    _print(arguments, [vars(row) for row in rows], "\n".join(lines) or "none")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.repair:  # the cache is not opened first, as the key index itself may be damaged
        done = repair(arguments.cache, on_progress=show_progress("files"))
        _print(arguments, done.to_dict(), done.to_text())
        return 0
    cache = FeatureCache.open(arguments.cache)
    problems = cache.verify(on_progress=show_progress("files"))
    text = "\n".join([*problems, "`meteor cache verify --repair` lets the next build encode the damaged images again"])
    content = {"images": len(cache), "problems": problems}
    _print(arguments, content, text if problems else f"{len(cache)} images intact")
    return 1 if problems else 0


def _diff(arguments: argparse.Namespace) -> int:
    found = diff_caches(FeatureCache.open(arguments.cache), FeatureCache.open(arguments.other))
    _print(arguments, found.to_dict(), found.to_text())
    return 0 if found.equal else 1


def _hours(text: str) -> float:
    value = float(text)
    # The negation refuses nan as well.
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of hours from 0 on")
    return value


def _gc(arguments: argparse.Namespace) -> int:
    uri = storage.absolute(arguments.cache)
    for run in arguments.unpin:
        unpin(uri, run)
    if arguments.older_than < 1:
        print(
            f"warning: --older-than {arguments.older_than:g} also deletes superseded versions that a job which runs now may "
            "read: make sure that no job uses this cache",
            file=sys.stderr,
        )
    plan = plan_gc(uri, older_than_s=arguments.older_than * _SECONDS_PER_HOUR)
    if not arguments.delete:
        _print(arguments, plan.to_dict(), f"{plan.to_text()}\nnothing was changed; --delete deletes the files")
        return 0
    report = run_gc(plan, on_progress=show_progress("files"))
    _print(arguments, {"plan": plan.to_dict(), "done": report.to_dict()}, f"{plan.to_text()}\n{report.to_text()}")
    return 0


def _transcode(arguments: argparse.Namespace) -> int:
    uri = transcode(storage.absolute(arguments.cache), arguments.codec, on_progress=show_progress("images"))
    cache = FeatureCache.open(uri)
    content = {"uri": uri, "images": len(cache), "payload_bytes": cache.num_bytes, "codec_error": cache.codec_error()}
    _print(arguments, content, _lines(content))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    settings = read_run(arguments)
    cost = estimate_cache(Inputs(settings))
    options = {"rate": arguments.rate, "usd_per_gb": arguments.usd_per_gb, "num_runs": arguments.num_runs}
    _print(arguments, cost.to_dict(**options), f"cache of run {settings.name}\n{cost.to_text(**options)}")
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    audit = audit_run(
        read_run(arguments),
        num_images=arguments.images,
        tolerance=arguments.tolerance,
        seed=arguments.seed,
        device=arguments.device,
        on_progress=show_progress("images"),
    )
    _print(arguments, audit.to_dict(), audit.to_text())
    return 1 if audit.failed else 0
