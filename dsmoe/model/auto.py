"""Registration of the architecture with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from dsmoe.config import DSMoEConfig
from dsmoe.model.modeling import DSMoEForCausalLM, DSMoEModel


def register() -> None:
    """Let AutoConfig, AutoModel and AutoModelForCausalLM load model_type "dsmoe"; calling it again changes nothing."""
    AutoConfig.register(DSMoEConfig.model_type, DSMoEConfig, exist_ok=True)
    AutoModel.register(DSMoEConfig, DSMoEModel, exist_ok=True)
    AutoModelForCausalLM.register(DSMoEConfig, DSMoEForCausalLM, exist_ok=True)
