"""Run, resume and tabulate a study: `python train/study.py configs/scaling/sweep.yaml --output runs/scaling`."""

import sys

from dsmoe.study.command import main

if __name__ == "__main__":
    sys.exit(main())
