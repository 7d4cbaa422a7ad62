"""Compare training on one process with training on two; `--help` says how."""

import sys

from dsmoe.trainer.compare_processes import main

if __name__ == "__main__":
    sys.exit(main())
