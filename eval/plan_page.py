"""Figures and tables of a scaling law: `python eval/plan_page.py --output eval/records/planner`."""

import sys

from dsmoe.planner.page import main

if __name__ == "__main__":
    sys.exit(main())
