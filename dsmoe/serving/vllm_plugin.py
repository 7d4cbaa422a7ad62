"""The plugin by which vLLM serves this architecture (entry point group `vllm.general_plugins`).

vLLM calls `register` in each of its processes, so `vllm.LLM(folder)` and its server load a dsmoe folder as they load
any other, without trust_remote_code. The model class is named, not imported: it is loaded when a folder asks for it.
"""

import contextlib
import sys
from typing import Any

ARCHITECTURE = "DSMoEForCausalLM"
MODEL = "dsmoe.serving.vllm_model:DSMoEForCausalLM"


def register() -> None:
    """Tell transformers the configuration and vLLM the model; calling it again changes nothing."""
    from vllm import ModelRegistry

    from dsmoe.model.auto import register as register_with_transformers

    register_with_transformers()
    _refuse_early()
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, MODEL)


def _refuse_early() -> None:
    """Have vLLM check its arguments in the process that was given them; the model checks them again in its own."""
    with contextlib.suppress(ImportError):  # an internal table of vLLM
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

        from dsmoe.serving.limits import check_engine, needs_eager

        class Checks(VerifyAndUpdateConfig):
            """vLLM's form of a check."""

            @staticmethod
            def verify_and_update_config(vllm_config: Any) -> None:
                """Refuse what can't be served, and switch CUDA graphs off where the model can't be captured."""
                check_engine(vllm_config)
                model, device = vllm_config.model_config, vllm_config.device_config.device_type
                reason = needs_eager(model.hf_config, device)
                if reason is not None and not model.enforce_eager:
                    print(f"note: vLLM runs eagerly, without CUDA graphs: {reason}", file=sys.stderr)
                    model.enforce_eager = True

        MODELS_CONFIG_MAP.setdefault(ARCHITECTURE, Checks)
