"""Training: one loop for dense twins, SMoE and DS-MoE, which differ only in their configuration."""

from dsmoe.trainer.command import main

__all__ = ["main"]
