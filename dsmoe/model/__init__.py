"""The model: one transformers architecture that config turns into a dense twin, an SMoE or a DS-MoE."""

from dsmoe.model.generation import Decoder, generate
from dsmoe.model.inputs import model_inputs
from dsmoe.model.int8 import quantize_int8
from dsmoe.model.modeling import DSMoEForCausalLM, DSMoEModel
from dsmoe.model.outputs import DSMoECausalLMOutput, DSMoEModelOutput
from dsmoe.model.policy import set_routing, use_routing
from dsmoe.model.recompute import set_recompute
from dsmoe.model.removal import remove_experts
from dsmoe.model.transformers_experts import wide_experts_forward

__all__ = [
    "DSMoECausalLMOutput",
    "DSMoEForCausalLM",
    "DSMoEModel",
    "DSMoEModelOutput",
    "Decoder",
    "generate",
    "model_inputs",
    "quantize_int8",
    "remove_experts",
    "set_recompute",
    "set_routing",
    "use_routing",
    "wide_experts_forward",
]
