"""Visiting orders: worked by hand on small maps, and the vectorised index against the spelled-out sequence."""

import pytest
import torch

from meteor.ssm import scan_index, scan_order, scan_sequence


def make_rows(sequence: list[tuple[str, int]], max_patches: int) -> list[int]:
    """The sequence as indices into [TL | T | INS]."""
    start = {"TL": 0, "T": max_patches, "INS": 2 * max_patches + 1}
    return [start[kind] + patch for kind, patch in sequence]


def test_forward_order_on_a_2x2_map_puts_each_summary_before_its_token_and_ins_in_the_middle() -> None:
    assert scan_sequence(4) == [
        ("TL", 0),
        ("T", 0),
        ("TL", 1),
        ("T", 1),
        ("INS", -1),
        ("TL", 2),
        ("T", 2),
        ("TL", 3),
        ("T", 3),
    ]


def test_backward_order_on_a_2x2_map_is_not_the_flip_of_the_forward_order() -> None:
    backward = scan_sequence(4, direction="backward")
    assert backward == [
        ("TL", 3),
        ("T", 3),
        ("TL", 2),
        ("T", 2),
        ("INS", -1),
        ("TL", 1),
        ("T", 1),
        ("TL", 0),
        ("T", 0),
    ]
    assert backward != scan_sequence(4)[::-1]


def test_orders_on_a_2x3_map_keep_ins_between_the_third_and_the_fourth_patch() -> None:
    assert [patch for _, patch in scan_sequence(6)] == [0, 0, 1, 1, 2, 2, -1, 3, 3, 4, 4, 5, 5]
    assert [patch for _, patch in scan_sequence(6, direction="backward")] == [5, 5, 4, 4, 3, 3, -1, 2, 2, 1, 1, 0, 0]


def test_ins_stands_at_the_same_place_of_the_map_when_the_number_of_patches_is_odd() -> None:
    assert scan_sequence(3, mode="single") == [("T", 0), ("INS", -1), ("T", 1), ("T", 2)]
    assert scan_sequence(3, mode="single", direction="backward") == [("T", 2), ("T", 1), ("INS", -1), ("T", 0)]
    assert scan_sequence(3, direction="backward") == [
        ("TL", 2),
        ("T", 2),
        ("TL", 1),
        ("T", 1),
        ("INS", -1),
        ("TL", 0),
        ("T", 0),
    ]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("mode", ["single", "local_to_single"])
def test_a_map_without_patches_is_the_instruction_token_alone(mode: str, direction: str) -> None:
    assert scan_sequence(0, mode=mode, direction=direction) == [("INS", -1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "both"}, "two sequences"),
        ({"mode": "zigzag"}, "single, local_to_single"),
        ({"direction": "up"}, "forward, backward"),
    ],
)
def test_orders_that_do_not_exist_are_refused_by_both_functions(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scan_sequence(4, **arguments)
    with pytest.raises(ValueError, match=message):
        scan_index(torch.tensor([4]), 4, **{"mode": "single", "direction": "forward"} | arguments)


def test_a_negative_number_of_patches_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        scan_sequence(-1)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("mode", ["single", "local_to_single"])
def test_a_mixed_batch_of_indices_equals_each_sequence(mode: str, direction: str) -> None:
    counts = [0, 1, 2, 3, 4, 5, 6, 7, 16, 29, 36, 64]
    max_patches = 64
    index = scan_index(torch.tensor(counts), max_patches, mode, direction)
    max_steps = (2 if mode == "local_to_single" else 1) * max_patches + 1
    assert index.order.shape == index.valid.shape == (len(counts), max_steps)
    for row, count in enumerate(counts):
        sequence = scan_sequence(count, mode=mode, direction=direction)
        num_steps = len(sequence)
        assert index.valid[row].tolist() == [step < num_steps for step in range(max_steps)]
        assert index.order[row, :num_steps].tolist() == make_rows(sequence, max_patches)
        assert index.instruction_step[row] == sequence.index(("INS", -1))
        expected = [sequence.index(("T", patch)) for patch in range(count)]
        assert index.token_steps[row].tolist() == expected + [0] * (max_patches - count)


@pytest.mark.parametrize("count", range(1, 40))
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_row_of_the_table_is_visited_once_without_padding(count: int, direction: str) -> None:
    index = scan_index(torch.tensor([count]), count, "local_to_single", direction)
    assert index.valid.all()
    assert sorted(index.order[0].tolist()) == list(range(2 * count + 1))


def test_padding_points_at_a_row_that_exists() -> None:
    index = scan_index(torch.tensor([0, 2]), 5, "local_to_single", "backward")
    assert (index.order[~index.valid] == 10).all()


def test_an_empty_batch_has_empty_indices() -> None:
    index = scan_index(torch.zeros(0, dtype=torch.long), 0, "local_to_single", "forward")
    assert index.order.shape == (0, 1)
    assert index.token_steps.shape == (0, 0)


@pytest.mark.parametrize("mode", ["single", "local_to_single"])
def test_an_order_holds_both_directions(mode: str) -> None:
    counts = torch.tensor([6, 0, 3])
    order = scan_order(counts, 6, mode)
    assert order.has_summaries == (mode == "local_to_single")
    assert order.num_steps.tolist() == [len(scan_sequence(count, mode=mode)) for count in counts.tolist()]
    for direction, name in enumerate(("forward", "backward")):
        index = scan_index(counts, 6, mode, name)
        assert torch.equal(order.rows[:, direction], index.order)
        assert torch.equal(order.read_steps[:, direction, :-1], index.token_steps)
        assert torch.equal(order.read_steps[:, direction, -1], index.instruction_step)
