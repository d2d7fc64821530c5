"""Small checkpoints for tests."""

import itertools

import torch

from meteor.checkpoint.format import KINDS, Fragment, checkpoint_uri, publish, write_fragments

SHAPES = {"projector.weight": [3, 4], "projector.bias": [5], "llm.scale": []}


def make_state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {(kind, name): torch.randn(shape, generator=generator) for kind in KINDS for name, shape in SHAPES.items()}


def pieces(state, cuts):
    """Fragments of every tensor, cut at the same elements (where it has so many)."""
    for (kind, name), values in state.items():
        flat = values.reshape(-1)
        bounds = [0, *(cut for cut in cuts if cut < flat.numel()), flat.numel()]
        for start, end in itertools.pairwise(bounds):
            yield Fragment(kind, name, start, flat[start:end])


def write_checkpoint(root, step, state=None, **facts):
    uri = checkpoint_uri(root, step)
    write_fragments(uri, 0, pieces(state or make_state(step), []))
    publish(uri, world_size=1, shapes=SHAPES, state={"step": step, **facts})
    return uri


def assert_holds(checkpoint, state):
    for (kind, name), values in state.items():
        assert torch.equal(checkpoint.read(kind, name), values), (kind, name)


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
