"""Reusable memory for payloads, because fresh memory costs more time than reading a file.

The kernel maps fresh memory page by page while it is filled. On a virtual machine the 1,450 page faults of 6 MB took 3 to
15 ms, whereas reading the file and its crc32 took 2 ms.
"""

import threading
import weakref
from collections import defaultdict

import numpy as np
import torch


class BufferPool:
    """Pool of writable memory that returns by itself when it is no longer used; safe to share between threads.

    Args:
        limit_bytes: most unused memory that the pool keeps.

    Attributes:
        kept_bytes: unused memory in the pool.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self.kept_bytes = 0
        self._free: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        # Reentrant, because garbage collection may return memory while this thread holds the lock.
        self._lock = threading.RLock()

    def take(self, size_bytes: int) -> memoryview:
        """Return memory of this size with arbitrary content; it is free again when its last view or tensor is gone."""
        rounded_bytes = _round_up(size_bytes)
        with self._lock:
            free = self._free[rounded_bytes]
            memory = free.pop() if free else None
            self.kept_bytes -= 0 if memory is None else rounded_bytes
        if memory is None:
            # Torch's memory is aligned, and unlike a bytearray it is not zeroed first.
            memory = torch.empty(rounded_bytes, dtype=torch.uint8)
        # Every view refers to this array and not to the memory below it, so the array ends after the last view.
        array = np.frombuffer(memory.numpy(), dtype=np.uint8, count=size_bytes)
        weakref.finalize(array, self._give_back, memory).atexit = False
        return array.data

    def _give_back(self, memory: torch.Tensor) -> None:
        with self._lock:
            if self.kept_bytes + len(memory) <= self._limit_bytes:
                self.kept_bytes += len(memory)
                self._free[len(memory)].append(memory)


def _round_up(size_bytes: int) -> int:
    """Round up to one of eight sizes per power of two, so that images of similar size can reuse each other's memory."""
    step = max(1 << max(size_bytes.bit_length() - 4, 0), 4096)
    return -(-size_bytes // step) * step


# Shared by all caches that this process reads.
PAYLOAD_MEMORY = BufferPool(256 << 20)
