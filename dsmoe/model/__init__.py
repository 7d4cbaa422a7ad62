"""The model: one transformers architecture that config turns into a dense twin, an SMoE or a DS-MoE."""

from dsmoe.model.inputs import model_inputs
from dsmoe.model.modeling import DSMoECausalLMOutput, DSMoEForCausalLM, DSMoEModel, DSMoEModelOutput
from dsmoe.model.policy import set_routing, use_routing

__all__ = [
    "DSMoECausalLMOutput",
    "DSMoEForCausalLM",
    "DSMoEModel",
    "DSMoEModelOutput",
    "model_inputs",
    "set_routing",
    "use_routing",
]
