"""Compilation of DeepSpeed's operator for CPUs ahead of the first training, which would wait for it about a minute."""

import os
import sys


def main() -> int:
    """Build the operator for communication in shared memory; without a compiler, DeepSpeed uses gloo instead."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator import get_accelerator

    try:
        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
    except (OSError, RuntimeError) as error:
        print(f"DeepSpeed's operator for CPUs cannot be built here ({error}); training uses gloo", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
