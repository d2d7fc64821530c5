"""Compile what DeepSpeed compiles at first use on CPUs (about a minute, once), so that the first training does not wait."""

import os
import sys


def main() -> int:
    """Build the shared-memory communication op; without a compiler DeepSpeed falls back to gloo by itself."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator import get_accelerator

    try:
        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
    except (OSError, RuntimeError) as error:
        print(f"DeepSpeed's CPU communication op cannot be built here ({error}); training uses gloo", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
