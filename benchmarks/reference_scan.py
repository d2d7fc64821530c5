"""Times the reference selective scan at the size of one full sub-image pair: `python benchmarks/reference_scan.py`."""

import time

import torch

from meteor.ssm import selective_scan

BATCH, CHANNELS, LENGTH, STATE = 2, 1024, 1153, 16
NUM_RUNS = 5


def main() -> None:
    torch.manual_seed(0)
    u, delta = (torch.randn(BATCH, CHANNELS, LENGTH) for _ in range(2))
    a = -torch.rand(CHANNELS, STATE)
    b, c = (torch.randn(BATCH, STATE, LENGTH) for _ in range(2))
    u.requires_grad_()
    forward, both = [], []
    for _ in range(NUM_RUNS):
        started = time.perf_counter()
        out = selective_scan(u, delta, a, b, c, delta_softplus=True, backend="reference")
        forward.append(time.perf_counter() - started)
        out.sum().backward()
        both.append(time.perf_counter() - started)
    shape = f"b {BATCH}, d {CHANNELS}, l {LENGTH}, n {STATE}, float32, {torch.get_num_threads()} threads"
    print(f"{shape}: forward {min(forward):.2f} s, with backward {min(both):.2f} s ({min(both) / min(forward):.1f} x)")


if __name__ == "__main__":
    main()
