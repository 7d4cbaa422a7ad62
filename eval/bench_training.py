"""Time and memory of dense training; `--help` says how."""

import sys

from dsmoe.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
