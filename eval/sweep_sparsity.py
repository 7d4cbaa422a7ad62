"""The sparsity frontier of a checkpoint: `python eval/sweep_sparsity.py runs/dsmoe --data data/mine`."""

import sys

from dsmoe.report.sparsity import main

if __name__ == "__main__":
    sys.exit(main())
