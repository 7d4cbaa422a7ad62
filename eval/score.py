"""Score models side by side; `--help` says how, and `eval/README.md` more."""

import sys

from dsmoe.evaluation.score import main

if __name__ == "__main__":
    sys.exit(main())
