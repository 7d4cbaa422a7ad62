"""DS-MoE: mixture-of-experts language models that are trained densely and run sparsely.

Importing the package registers the architecture, so that AutoConfig, AutoModel and AutoModelForCausalLM load its
checkpoints.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from dsmoe.config import DSMoEConfig
from dsmoe.model import DSMoEForCausalLM, DSMoEModel

__version__ = "0.1.0"
__all__ = ["DSMoEConfig", "DSMoEForCausalLM", "DSMoEModel"]

AutoConfig.register(DSMoEConfig.model_type, DSMoEConfig, exist_ok=True)
AutoModel.register(DSMoEConfig, DSMoEModel, exist_ok=True)
AutoModelForCausalLM.register(DSMoEConfig, DSMoEForCausalLM, exist_ok=True)
