"""What a user of a GGUF file should know."""

from dsmoe.config import DSMoEConfig
from dsmoe.export.gguf.engine import EngineReport
from dsmoe.export.gguf.forms import GGUF_DTYPES
from dsmoe.export.gguf.tokenizer import Vocabulary
from dsmoe.export.requirements import uniform_top_k
from dsmoe.export.targets import is_exact


def gguf_notes(
    config: DSMoEConfig,
    architecture: str,
    dtype: str,
    vocabulary: Vocabulary | None,
    engine: EngineReport | None,
) -> list[str]:
    """One line for each thing to know.

    Args:
        config: of the dsmoe model.
        architecture: of llama.cpp.
        dtype: of the matrices.
        vocabulary: what the file says about its tokenizer; None: nothing.
        engine: what llama.cpp gave; None: it was not run.
    """
    notes = []
    if config.num_experts > 1 and uniform_top_k(config, architecture) == config.num_experts:
        notes.append(
            f"all {config.num_experts} experts are kept for every token: `dsmoe sparsify` first for speed"
        )
    if config.num_experts == 1 and architecture == "olmoe":
        notes.append(
            "llama.cpp has no dense architecture with this q/k norm: the dense twin is stored as one expert of OLMoE, "
            "whose prompts run slower there than those of a Llama of its shape (qk_norm 'none'); decoding is as fast"
        )
    # null in a config file, derived by now
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    if architecture == "olmoe" and kv_heads < config.num_attention_heads:
        notes.append(
            f"llama.cpp's OLMoE has as many key-value heads as query heads: the {kv_heads} heads are "
            f"stored as {config.num_attention_heads}, exactly, with a key-value cache larger by that"
        )
    if not is_exact(config, GGUF_DTYPES[dtype]):
        notes.append(
            f"folding (gate scale {config.mlp_gate_scale:g}, normalize_embeddings {config.normalize_embeddings}) was "
            f"done in float32 before rounding to {dtype}; it is inexact there: export float32 for equality"
        )
    if dtype != "float32":
        notes.append(
            f"llama.cpp rounds the input of matrix products to {dtype} as well: logits differ by that, and a near tie "
            "may keep another expert (norms and routers are float32)"
        )
    if vocabulary is None:
        notes.append("no tokenizer in the file (no_vocab): llama.cpp takes and gives token ids alone")
    else:
        notes += vocabulary.notes
    if engine is None:
        notes.append("llama-cpp-python is not installed here: llama.cpp itself was not run")
    return notes
