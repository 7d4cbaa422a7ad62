"""What is not served, each refused in one line before a model is loaded."""

from typing import Any

from dsmoe.config import DSMoEConfig
from dsmoe.errors import UserError
from dsmoe.serving.experts_path import experts_path


def check_servable(config: DSMoEConfig) -> None:
    """Refuse what a server must not do.

    Raises:
        UserError: a policy under which requests of one batch would change each other's experts.
    """
    for part in ("mlp", "attention"):
        for layer in range(config.num_hidden_layers):
            policy = config.routing(part, layer)
            if policy["policy"] == "threshold_top_k" and policy["k"] is None:
                raise UserError(
                    f"{part}_routing[{layer}]: threshold_top_k with k null counts over the batch at hand, so requests "
                    "would change each other; give it a k, or use threshold"
                )


def needs_eager(config: DSMoEConfig, device_type: str) -> str | None:
    """Why vLLM must run a model without CUDA graphs, in a few words; None: it needn't.

    The own paths of experts and of attention heads have the host read which ones tokens keep; a graph that is captured
    once and replayed has no host in it.

    Args:
        config: of the model.
        device_type: "cpu", "cuda", ...
    """
    if device_type == "cpu":
        return None
    if experts_path(config, device_type) == "own" and not config.keeps_all("mlp"):
        return "its experts are computed by this project's own code, not vLLM's"
    if not config.keeps_all("attention"):
        return "its attention experts are chosen per token"
    return None


def check_engine(vllm_config: Any) -> None:
    """Refuse what vLLM is asked for and can't do with this architecture.

    Args:
        vllm_config: vLLM's whole configuration.

    Raises:
        UserError: names vLLM's argument, its value and what is right.
    """
    config = vllm_config.model_config.hf_config
    check_servable(config)
    experts_path(config, vllm_config.device_config.device_type)
    parallel = vllm_config.parallel_config
    found = {
        "tensor_parallel_size": (parallel.tensor_parallel_size, 1),
        "pipeline_parallel_size": (parallel.pipeline_parallel_size, 1),
        "enable_expert_parallel": (parallel.enable_expert_parallel, False),
        "quantization": (vllm_config.model_config.quantization, None),
        "enable_lora": (vllm_config.lora_config is not None, False),
    }
    for name, (value, served) in found.items():
        if value != served:
            raise UserError(f"vLLM's {name} is {value}; a dsmoe model is served with {served}")
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    if dtype not in ("bfloat16", "float32"):
        raise UserError(f"vLLM's dtype is {dtype}; a dsmoe model is served in bfloat16 or float32")
