"""Results, plots and table of the quickstart: `python eval/report_quickstart.py runs/quickstart`."""

import sys

from dsmoe.report.quickstart import main

if __name__ == "__main__":
    sys.exit(main())
