"""Time and memory of training with K of N experts kept; `--help` says how."""

import sys

from dsmoe.bench.sparse_training import main

if __name__ == "__main__":
    sys.exit(main())
