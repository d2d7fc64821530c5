import itertools

import pytest
import torch
from making import SHAPES, assert_holds, files_below, make_state, pieces, write_checkpoint

from meteor.checkpoint import format as checkpoint_format
from meteor.checkpoint.folder import complete_checkpoints
from meteor.checkpoint.format import KINDS, Checkpoint, Fragment, checkpoint_uri, num_written, publish, write_fragments
from meteor.errors import CheckpointError, StorageError


def test_fragments_of_two_ranks_read_back_as_whole_tensors(root):
    state, uri = make_state(), checkpoint_uri(root, 40)
    fragments = list(pieces(state, [1, 7]))
    # Neither rank holds a whole tensor, and rank 0 writes them back to front.
    write_fragments(uri, 0, fragments[::2][::-1])
    write_fragments(uri, 1, fragments[1::2])
    publish(uri, world_size=2, shapes=SHAPES, state={"step": 40, "epoch": 1})
    checkpoint = Checkpoint(uri)
    assert_holds(checkpoint, state)
    assert (checkpoint.shapes, checkpoint.state) == (SHAPES, {"step": 40, "epoch": 1})
    assert complete_checkpoints(root) == [uri]
    assert uri.endswith("step_00000040")


def test_values_become_float32_and_survive_exactly(tmp_path):
    low = torch.randn(7, dtype=torch.bfloat16)
    uri = checkpoint_uri(str(tmp_path), 1)
    write_fragments(uri, 0, [Fragment(kind, "a", 0, low) for kind in KINDS])
    publish(uri, world_size=1, shapes={"a": [7]}, state={})
    read = Checkpoint(uri).read("weights", "a")
    assert read.dtype == torch.float32
    assert torch.equal(read, low.float())


def test_large_shares_are_divided_among_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_format, "_FILE_BYTES", 40)
    state, uri = make_state(), checkpoint_uri(str(tmp_path), 1)
    write_fragments(uri, 0, pieces(state, [2]))
    publish(uri, world_size=1, shapes=SHAPES, state={})
    # A file closes at 10 elements or more: 2 + 10 | 2 + 3 + 1, 2 + 10 | 2 + 3 + 1, 2 + 10 | 2 + 3 + 1.
    assert [name for name in files_below(tmp_path) if name.endswith("safetensors")] == [
        f"step_00000001/0/rank_00000_{i:03d}.safetensors" for i in range(4)
    ]
    assert_holds(Checkpoint(uri), state)


def test_a_checkpoint_without_manifest_does_not_exist(root):
    uri = checkpoint_uri(root, 40)
    write_fragments(uri, 0, pieces(make_state(), []))
    assert complete_checkpoints(root) == []
    with pytest.raises(CheckpointError, match=r"step_00000040 is not a complete checkpoint"):
        Checkpoint(uri)


def drop(fragments, index):
    return [fragment for i, fragment in enumerate(fragments) if i != index]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda parts: drop(parts, 0), r"weights of projector\.weight is whole up to element 0, .* \[3, 4\]"),
        (lambda parts: drop(parts, 1), r"weights of projector\.weight is whole up to element 3"),
        (lambda parts: parts[:-1], r"exp_avg_sq of llm\.scale is whole up to element 0"),
        # As many elements as the tensor has, but some twice and some never.
        (lambda parts: [parts[0], *drop(parts, 1), Fragment("weights", "projector.weight", 0, torch.ones(6))], "up to"),
    ],
)
def test_tensors_that_the_fragments_do_not_cover_are_refused(tmp_path, spoil, message):
    uri = checkpoint_uri(str(tmp_path), 1)
    write_fragments(uri, 0, spoil(list(pieces(make_state(), [3, 9]))))
    with pytest.raises(CheckpointError, match=message):
        publish(uri, world_size=1, shapes=SHAPES, state={})
    assert complete_checkpoints(str(tmp_path)) == []


def test_a_rank_that_wrote_nothing_is_noticed(tmp_path):
    uri = checkpoint_uri(str(tmp_path), 1)
    fragments = list(pieces(make_state(), [2]))
    write_fragments(uri, 0, fragments[::2])
    write_fragments(uri, 1, [])
    with pytest.raises(CheckpointError, match="is whole up to element"):
        publish(uri, world_size=2, shapes=SHAPES, state={})


def test_what_an_attempt_with_more_ranks_left_behind_is_not_read(tmp_path):
    uri, state = checkpoint_uri(str(tmp_path), 1), make_state(1)
    write_fragments(uri, 0, [])
    write_fragments(uri, 1, pieces(make_state(2), []))
    write_fragments(uri, 0, pieces(state, []))
    publish(uri, world_size=1, shapes=SHAPES, state={})
    assert_holds(Checkpoint(uri), state)


def test_what_a_killed_attempt_wrote_of_the_same_step_is_not_read(tmp_path):
    uri, state = checkpoint_uri(str(tmp_path), 1), make_state(1)
    write_fragments(uri, 0, pieces(make_state(2), []), attempt="killed")
    write_fragments(uri, 1, [], attempt="killed")
    assert num_written(uri, attempt="next", world_size=2) == 0
    write_fragments(uri, 1, pieces(state, []), attempt="next")
    assert num_written(uri, attempt="next", world_size=2) == 1
    write_fragments(uri, 0, [], attempt="next")
    assert num_written(uri, attempt="next", world_size=2) == 2
    publish(uri, world_size=2, shapes=SHAPES, state={}, attempt="next")
    assert_holds(Checkpoint(uri), state)


@pytest.mark.parametrize("cuts", [[], [5], [3, 4, 9]])
def test_a_range_is_read_from_the_fragments_it_touches_and_no_other(tmp_path, monkeypatch, cuts):
    monkeypatch.setattr(checkpoint_format, "_FRAGMENT_ELEMENTS", 4)
    state, uri = make_state(), checkpoint_uri(str(tmp_path), 1)
    write_fragments(uri, 0, pieces(state, cuts))
    publish(uri, world_size=1, shapes=SHAPES, state={})
    flat, checkpoint, read = state["exp_avg", "projector.weight"].reshape(-1), Checkpoint(uri), []
    original = checkpoint._read_fragment
    monkeypatch.setattr(checkpoint, "_read_fragment", lambda part: read.append(part) or original(part))
    for start, end in itertools.combinations_with_replacement(range(13), 2):
        read.clear()
        assert torch.equal(checkpoint.read_range("exp_avg", "projector.weight", start, end - start), flat[start:end])
        assert all(part["offset"] < end and part["offset"] + part["num_elements"] > start for part in read)
        assert all(part["num_elements"] <= 4 for part in read)


def reads_as(checkpoint, tensor, values):
    try:
        return torch.equal(checkpoint.read(*tensor), values)
    except CheckpointError:
        return False


def test_a_damaged_header_never_gives_a_wrong_tensor(tmp_path):
    state = make_state()
    uri = write_checkpoint(str(tmp_path), 1, state)
    file = tmp_path / "step_00000001/0/rank_00000_000.safetensors"
    intact = file.read_bytes()
    num_refused = 0
    for position in range(8 + int.from_bytes(intact[:8], "little")):
        damaged = bytearray(intact)
        damaged[position] ^= 1
        file.write_bytes(damaged)
        for tensor, values in state.items():
            try:
                assert torch.equal(Checkpoint(uri).read(*tensor), values), position
            except (CheckpointError, StorageError):
                num_refused += 1
    assert num_refused > 100


def test_every_damaged_byte_of_a_tensor_is_noticed(tmp_path):
    state = make_state()
    uri = write_checkpoint(str(tmp_path), 1, state)
    file = tmp_path / "step_00000001/0/rank_00000_000.safetensors"
    intact = file.read_bytes()
    first = 8 + int.from_bytes(intact[:8], "little")
    for position in range(first, len(intact), 7):
        damaged = bytearray(intact)
        damaged[position] ^= 1
        file.write_bytes(damaged)
        (refused,) = [tensor for tensor, values in state.items() if not reads_as(Checkpoint(uri), tensor, values)]
        with pytest.raises(CheckpointError, match=f"{refused[0]}/{refused[1]}@0 is damaged"):
            Checkpoint(uri).read(*refused)


def test_unknown_tensors_and_newer_formats_are_refused(tmp_path, monkeypatch):
    uri = write_checkpoint(str(tmp_path), 1)
    with pytest.raises(CheckpointError, match="has no weights of elsewhere"):
        Checkpoint(uri).read("weights", "elsewhere")
    monkeypatch.setattr(checkpoint_format, "CHECKPOINT_FORMAT_VERSION", 0)
    with pytest.raises(CheckpointError, match="has format 3; this version reads 0"):
        Checkpoint(uri)
