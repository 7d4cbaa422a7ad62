"""Time of expert layers in inference; `--help` says how."""

import sys

from dsmoe.bench.inference_command import main
from dsmoe.records import write_record

if __name__ == "__main__":
    sys.exit(main(write_record))
