"""Kill training at random moments and compare with a run left alone; `--help` says how, and `train/README.md` more."""

import os
import sys

# training processes are forked from this one, which must have a single thread
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

from dsmoe.trainer.crash_test import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
