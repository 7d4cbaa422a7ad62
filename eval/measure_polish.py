"""What polishing did: `python eval/measure_polish.py runs/dsmoe --polished runs/polished --data data/mine`."""

import sys

from dsmoe.report.polish import main

if __name__ == "__main__":
    sys.exit(main())
