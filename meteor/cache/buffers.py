"""Memory for payloads that is used again once nobody refers to it.

Fresh memory of some megabytes is mapped page by page while it is filled, which takes longer than to read a file and to
check its bytes (on a virtual machine 1,450 page faults for 6 MB took 3 to 15 ms, reading and crc32 take 2).
"""

import threading
import weakref
from collections import defaultdict

import numpy as np
import torch


class BufferPool:
    """Hands out writable memory and takes it back by itself; safe to share between threads.

    Args:
        limit_bytes: how much unused memory is kept at most.

    Attributes:
        kept_bytes: unused memory that is kept now.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self.kept_bytes = 0
        self._free: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        # Memory may come back while this very thread is in here, by garbage collection.
        self._lock = threading.RLock()

    def take(self, size_bytes: int) -> memoryview:
        """Memory of that size with any content; it is free again when the last view and tensor over it is gone."""
        room_bytes = _round_up(size_bytes)
        with self._lock:
            free = self._free[room_bytes]
            memory = free.pop() if free else None
            self.kept_bytes -= 0 if memory is None else room_bytes
        if memory is None:
            # Torch's memory is aligned, and not zeroed first as a bytearray would be.
            memory = torch.empty(room_bytes, dtype=torch.uint8)
        # Every view of an array holds the array, not the memory below it: its end is the end of them all.
        array = np.frombuffer(memory.numpy(), dtype=np.uint8, count=size_bytes)
        weakref.finalize(array, self._give_back, memory).atexit = False
        return array.data

    def _give_back(self, memory: torch.Tensor) -> None:
        with self._lock:
            if self.kept_bytes + len(memory) <= self._limit_bytes:
                self.kept_bytes += len(memory)
                self._free[len(memory)].append(memory)


def _round_up(size_bytes: int) -> int:
    """To one of eight sizes an octave, so that images of similar size share memory."""
    step = max(1 << max(size_bytes.bit_length() - 4, 0), 4096)
    return -(-size_bytes // step) * step


# Of all caches that this process reads.
PAYLOAD_MEMORY = BufferPool(256 << 20)
