"""Time and memory of training with K of N experts kept; `--help` says how."""

import sys

from dsmoe.bench.sparse_training import main
from dsmoe.records import write_record

if __name__ == "__main__":
    sys.exit(main(write_record))
