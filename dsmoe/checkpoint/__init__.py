"""Checkpoints of a training run: whole, verified by checksums; safetensors and JSON, no pickle."""

from dsmoe.checkpoint.diskfull import told_when_full
from dsmoe.checkpoint.folder import load_checkpoint, optimizer_tensors, save_checkpoint
from dsmoe.checkpoint.newest import checkpoint_folders, holds_checkpoints, newest_intact
from dsmoe.checkpoint.pretrained import save_pretrained
from dsmoe.checkpoint.retention import clean_leftovers, discard

__all__ = [
    "checkpoint_folders",
    "clean_leftovers",
    "discard",
    "holds_checkpoints",
    "load_checkpoint",
    "newest_intact",
    "optimizer_tensors",
    "save_checkpoint",
    "save_pretrained",
    "told_when_full",
]
