"""Checkpoints of a training run: whole or absent, weights and state as safetensors and JSON, no pickle."""

from dsmoe.checkpoint.folder import latest_checkpoint, load_checkpoint, save_checkpoint
from dsmoe.checkpoint.pretrained import save_pretrained

__all__ = ["latest_checkpoint", "load_checkpoint", "save_checkpoint", "save_pretrained"]
