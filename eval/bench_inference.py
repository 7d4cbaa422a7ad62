"""Time of expert layers in inference; `--help` says how."""

import sys

from dsmoe.bench.inference_command import main

if __name__ == "__main__":
    sys.exit(main())
