"""Throughput and memory of served models in several engines; `--help` says how."""

import sys

from dsmoe.bench.serving_command import main

if __name__ == "__main__":
    sys.exit(main())
