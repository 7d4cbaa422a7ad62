"""Train a dense, SMoE or DS-MoE language model: `accelerate launch train/pretrain.py --config ...`."""

import sys

from dsmoe.trainer import main

if __name__ == "__main__":
    sys.exit(main())
