"""Memory that is used again: never while anybody still looks at it."""

import torch

from meteor.cache.buffers import BufferPool

SIZE_BYTES = 100_000


def address(buffer: memoryview) -> int:
    return torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()


def test_memory_is_used_again_once_the_last_tensor_over_it_is_gone():
    pool = BufferPool(1 << 20)
    buffer = pool.take(SIZE_BYTES)
    place = address(buffer)
    slice_of_it = torch.frombuffer(buffer[10:20], dtype=torch.uint8)[2:4]
    del buffer
    other = pool.take(SIZE_BYTES)
    assert address(other) != place
    slice_of_it.fill_(7)
    del slice_of_it
    # A little smaller is served by the same memory.
    again = pool.take(SIZE_BYTES - 1000)
    assert (address(again), len(again)) == (place, SIZE_BYTES - 1000)


def test_buffers_in_use_never_overlap():
    pool = BufferPool(1 << 20)
    for _ in range(3):
        buffers = [pool.take(SIZE_BYTES + i) for i in range(10)]
        tensors = [torch.frombuffer(buffer, dtype=torch.uint8).fill_(i) for i, buffer in enumerate(buffers)]
        assert [len(buffer) for buffer in buffers] == [SIZE_BYTES + i for i in range(10)]
        assert all(bool((tensor == i).all()) for i, tensor in enumerate(tensors))
        del buffers, tensors


def test_no_more_than_the_limit_is_kept():
    pool = BufferPool(2 * SIZE_BYTES)
    buffers = [pool.take(SIZE_BYTES) for _ in range(10)]
    del buffers
    assert 0 < pool.kept_bytes <= 2 * SIZE_BYTES
    kept = pool.take(SIZE_BYTES)
    assert pool.kept_bytes < SIZE_BYTES
    del kept


def test_memory_is_aligned_for_torch():
    pool = BufferPool(1 << 20)
    assert all(address(pool.take(size_bytes)) % 64 == 0 for size_bytes in (1, 77, 4097, SIZE_BYTES))
