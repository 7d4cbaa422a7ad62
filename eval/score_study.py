"""Benchmark scores of a study's models: `python eval/score_study.py STUDY --output runs/largest --data data/quality`."""

import sys

from dsmoe.report.scores import main

if __name__ == "__main__":
    sys.exit(main())
