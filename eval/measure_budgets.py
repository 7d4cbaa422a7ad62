"""Losses of a study's models at several active shares: `python eval/measure_budgets.py STUDY --output runs/twins`."""

import sys

from dsmoe.report.budgets import main

if __name__ == "__main__":
    sys.exit(main())
