"""The model that a run starts from: drawn at random, or that of a model folder."""

from pathlib import Path

import torch

from dsmoe.checkpoint.pretrained import load_pretrained, model_folder
from dsmoe.config import DSMoEConfig
from dsmoe.config.run import ModelSettings, RunConfig
from dsmoe.data.agreement import check_tokenizer
from dsmoe.data.corpus import TokenCorpus
from dsmoe.errors import UserError
from dsmoe.model import DSMoEForCausalLM, set_recompute
from dsmoe.trainer.statistics import PARTS


def adopt_model(config: RunConfig) -> str | None:
    """Let `config.model` say what the model of `train.init_from` is; without one nothing changes.

    A DS-MoE trains with all its experts: routing policies that it was sparsified with are set aside.

    Returns:
        What the user should be told about that; None: nothing.

    Raises:
        UserError: no dsmoe model there, no text in `data.path`, or text of another tokenizer than the model's.
    """
    if not config.train.init_from:
        return None
    folder = model_folder(Path(config.train.init_from))
    notes = [check_tokenizer(TokenCorpus(config.data.path), folder)]
    found = DSMoEConfig.from_pretrained(folder)
    config.model = ModelSettings(
        **{name: getattr(found, name) for name in ModelSettings.__dataclass_fields__}
    )
    sparse = [part for part in PARTS if not found.keeps_all(part)]
    if found.kind == "dsmoe" and sparse:
        config.model.mlp_routing = config.model.attention_routing = None
        notes.append(
            f"note: {config.train.init_from} was sparsified ({' and '.join(sparse)}); training begins with all its "
            "experts (mask_phase.policies trains with its policies)"
        )
    config.check()
    return "\n".join(filter(None, notes)) or None


def check_teacher(config: RunConfig) -> str | None:
    """Whether a frozen teacher reads the run's text as the run does.

    Returns:
        What the user should be told; None: nothing, or there is no such teacher.

    Raises:
        UserError: no dsmoe model there, no text in `data.path`, or text of another tokenizer than the teacher's.
    """
    if not config.distillation.teacher:
        return None
    try:
        folder = model_folder(Path(config.distillation.teacher))
        return check_tokenizer(TokenCorpus(config.data.path), folder)
    except UserError as error:
        raise UserError(f"distillation.teacher: {error}") from None


def first_model(config: RunConfig, corpus: TokenCorpus) -> DSMoEForCausalLM:
    """The model at step 0, in training mode and with the run's settings of recomputation.

    Args:
        config: of the run.
        corpus: what it reads; its tokenizer's ids must fit.

    Raises:
        UserError: the corpus has more token ids than the model.
    """
    model_config = config.model_config()
    if model_config.vocab_size < corpus.vocab_size:
        raise UserError(
            f"model.vocab_size {model_config.vocab_size} is below the {corpus.vocab_size} entries of the tokenizer "
            f"in {config.data.path}"
        )
    if model_config.eos_token_id is None:
        model_config.eos_token_id = model_config.bos_token_id = model_config.pad_token_id = (
            corpus.eos_token_id
        )
    model = _first_weights(config, model_config)
    # a property of the run: no model folder holds it
    model.set_attn_implementation(config.train.attention)
    set_recompute(model, config.train.recompute_experts)
    if config.train.gradient_checkpointing:
        # renamed in transformers 5.23, which warns about the old name
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable()
        else:
            model.gradient_checkpointing_enable()
    return model.train()


def _first_weights(config: RunConfig, model_config: DSMoEConfig) -> DSMoEForCausalLM:
    if not config.train.init_from:
        return DSMoEForCausalLM(model_config)
    model = load_pretrained(Path(config.train.init_from), torch.float32)[0]
    model.config.mlp_routing = model_config.mlp_routing
    model.config.attention_routing = model_config.attention_routing
    return model
