"""A run that starts from the weights of a model folder."""

from pathlib import Path

import torch

from dsmoe.checkpoint.pretrained import load_pretrained, model_folder
from dsmoe.config import DSMoEConfig
from dsmoe.config.run import ModelSettings, RunConfig
from dsmoe.model import DSMoEForCausalLM


def adopt_model(config: RunConfig) -> None:
    """Let `config.model` say what the model of `train.init_from` is; without one nothing changes.

    Raises:
        UserError: no dsmoe model there.
    """
    if not config.train.init_from:
        return
    found = DSMoEConfig.from_pretrained(model_folder(Path(config.train.init_from)))
    config.model = ModelSettings(
        **{name: getattr(found, name) for name in ModelSettings.__dataclass_fields__}
    )
    config.check()


def first_weights(config: RunConfig, model_config: DSMoEConfig) -> DSMoEForCausalLM:
    """The model at step 0: drawn at random, or that of `train.init_from`.

    Args:
        config: of the run.
        model_config: of the model to draw.
    """
    if not config.train.init_from:
        return DSMoEForCausalLM(model_config)
    return load_pretrained(Path(config.train.init_from), torch.float32)[0]
