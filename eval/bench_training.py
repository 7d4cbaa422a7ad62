"""Time and memory of dense training; `--help` says how."""

import sys

from dsmoe.bench.command import main
from dsmoe.records import write_record

if __name__ == "__main__":
    sys.exit(main(write_record))
