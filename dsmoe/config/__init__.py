"""Configuration: the model (`model`), its routing policies (`routing`) and a training run (`run`)."""

from dsmoe.config.model import DSMoEConfig

__all__ = ["DSMoEConfig"]
