"""Real processes for tests of several workers."""

import os
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def start_workers() -> Callable[..., None]:
    """Call ``work(*args)`` in so many processes of one group and wait for all of them."""

    def start(world_size: int, work: Callable[..., None], *args: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.start_processes(_enter, (world_size, port, work, args), nprocs=world_size, start_method="fork")

    return start


def _enter(rank: int, world_size: int, port: int, work: Callable[..., None], args: tuple) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # DeepSpeed and torch.compile import what torch deprecates
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    work(*args)
    dist.destroy_process_group()
