"""Serving a checkpoint: the vLLM plugin and the command `dsmoe serve`."""
