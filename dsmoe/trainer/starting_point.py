"""A run that starts from the weights of a model folder."""

from pathlib import Path

import torch

from dsmoe.checkpoint.pretrained import load_pretrained, model_folder
from dsmoe.config import DSMoEConfig
from dsmoe.config.run import ModelSettings, RunConfig
from dsmoe.model import DSMoEForCausalLM
from dsmoe.trainer.statistics import PARTS


def adopt_model(config: RunConfig) -> str | None:
    """Let `config.model` say what the model of `train.init_from` is; without one nothing changes.

    A DS-MoE trains with all its experts: routing policies that it was sparsified with are set aside.

    Returns:
        What the user should be told about that; None: nothing.

    Raises:
        UserError: no dsmoe model there.
    """
    if not config.train.init_from:
        return None
    found = DSMoEConfig.from_pretrained(model_folder(Path(config.train.init_from)))
    config.model = ModelSettings(
        **{name: getattr(found, name) for name in ModelSettings.__dataclass_fields__}
    )
    note = None
    sparse = [part for part in PARTS if not found.keeps_all(part)]
    if found.kind == "dsmoe" and sparse:
        config.model.mlp_routing = config.model.attention_routing = None
        note = (
            f"note: {config.train.init_from} was sparsified ({' and '.join(sparse)}); training begins with all its "
            "experts (mask_phase.policies trains with its policies)"
        )
    config.check()
    return note


def first_weights(config: RunConfig, model_config: DSMoEConfig) -> DSMoEForCausalLM:
    """The model at step 0: drawn at random, or that of `train.init_from`.

    Args:
        config: of the run.
        model_config: of the model to draw.
    """
    if not config.train.init_from:
        return DSMoEForCausalLM(model_config)
    model = load_pretrained(Path(config.train.init_from), torch.float32)[0]
    model.config.mlp_routing = model_config.mlp_routing
    model.config.attention_routing = model_config.attention_routing
    return model
