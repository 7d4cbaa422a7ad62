"""What vLLM computes with the plugin against the same checkpoint under transformers.

vLLM runs in one child process for all models of a dtype (this file as a script), since it marks the model's class for
compilation in the process where it runs. Skipped where vLLM is not installed.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from dsmoe import DSMoEConfig, DSMoEForCausalLM

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_experts": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "router_initializer_range": 0.3,
}
TOP_2 = {"policy": "top_k", "k": 2}
THRESHOLD = {"policy": "threshold", "threshold": 1.3}
PER_EXPERT = {
    "policy": "threshold",
    "threshold": [0.5, 0.8, 1.0, 1.2, 1.4, 1.6, 2.0, 0.9],
    "score_weights": [1.0, 2.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0],
}
HEADS = {"num_attention_heads": 4, "num_attention_experts": 4, "qk_norm": "per_head"}
CASES = {
    "top_k": {"mlp_routing": TOP_2},
    "top_k_per_layer": {"mlp_routing": [TOP_2, {"policy": "top_k", "k": 4}], "normalize_embeddings": True},
    "untied": {"mlp_routing": TOP_2, "tie_word_embeddings": False, "qk_norm": "per_head"},
    "threshold": {"mlp_routing": THRESHOLD},
    "threshold_dropped": {"mlp_routing": {"policy": "dense"}},
    "threshold_per_expert": {"mlp_routing": PER_EXPERT},
    "top_p": {"mlp_routing": {"policy": "top_p", "top_p": 0.6}, "gate_normalization": "renormalized"},
    "l2": {"mlp_routing": TOP_2, "gate_normalization": "l2", "mlp_gate_scale": 2.5, "qk_norm": "none"},
    "removed": {
        "mlp_routing": {"policy": "threshold", "threshold": 1.0},
        "mlp_kept_experts": [[0, 1, 3, 4, 6], [2, 3, 4, 5, 6, 7]],
    },
    "gelu": {"mlp_routing": TOP_2, "mlp_type": "gelu", "router_type": "mlp", "router_hidden_size": 16},
    "dense": {"kind": "dense", "num_experts": 1},
    "heads": {**HEADS, "attention_routing": TOP_2, "mlp_routing": TOP_2},
    "heads_removed": {
        **HEADS,
        "attention_routing": {"policy": "threshold", "threshold": 1.1},
        "attention_kept_experts": [[0, 1, 3], [0, 1, 2, 3]],
    },
}
PROMPT_LENGTHS = (5, 17, 40)
NEW_TOKENS = 16
BOUNDS = {"float32": 1e-4, "bfloat16": 0.03}
# rounding to bfloat16 lets a near tie of two experts fall the other way at a few positions
SAME_GREEDY = {"float32": 1.0, "bfloat16": 0.9}


def prompts_of(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(512, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS[:count]]


def serve(folders, dtype, eager=True):
    """Child process: what vLLM answers for each folder, as one JSON line per folder."""
    from vllm import LLM, SamplingParams

    settings = {
        "skip_tokenizer_init": True,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
    }
    sampling = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, logprobs=0, prompt_logprobs=0, detokenize=False, ignore_eos=True
    )
    for folder in folders:
        try:
            llm = LLM(folder, dtype=dtype, enforce_eager=eager, kv_cache_memory_bytes=32 << 20, **settings)
        except Exception as error:
            print(json.dumps({"folder": folder, "error": str(error)}), flush=True)
            continue
        given = [{"prompt_token_ids": ids} for ids in prompts_of(len(PROMPT_LENGTHS))]
        answers = []
        for output in llm.generate(given, sampling, use_tqdm=False):
            (completion,) = output.outputs
            ids = output.prompt_token_ids + list(completion.token_ids)
            chosen = list(output.prompt_logprobs[1:]) + list(completion.logprobs)
            answers.append(
                {"ids": ids, "logprobs": [row[token].logprob for row, token in zip(chosen, ids[1:])]}
            )
        print(json.dumps({"folder": folder, "answers": answers}), flush=True)
        llm.llm_engine.engine_core.shutdown()
        del llm


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random checkpoints, one folder per case and dtype."""
    parent = tmp_path_factory.mktemp("served")

    def make(name, dtype):
        folder = parent / f"{name}-{dtype}"
        if not folder.exists():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = DSMoEForCausalLM(DSMoEConfig(**{**SIZES, **CASES[name]}))
            model.to(getattr(torch, dtype)).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def served(folders):
    """What vLLM answers for cases, by name; each group of cases is one child process."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")

    def run(names, dtype, *, experts="own", eager=True):
        environment = {
            **os.environ,
            "DSMOE_VLLM_EXPERTS": experts,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        given = {str(folders(name, dtype)): name for name in names}
        command = [sys.executable, __file__, dtype, "eager" if eager else "compiled", *given]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"folder"')]
        assert len(lines) == len(names), done.stdout[-3000:] + done.stderr[-6000:]
        return {given[line["folder"]]: line for line in lines}

    return run


@pytest.fixture(scope="module")
def all_served(served):
    """Every case in float32 and bfloat16."""
    return {dtype: served(list(CASES), dtype) for dtype in BOUNDS}


@torch.no_grad()
def disagreement(folder, dtype, line):
    """Mean |delta log p| of all tokens after the first, and the share of greedy tokens that are transformers'."""
    assert "answers" in line, line
    model = DSMoEForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    differences, greedy = [], []
    for answer, prompt in zip(line["answers"], prompts_of(len(PROMPT_LENGTHS))):
        ids = torch.tensor(answer["ids"])
        logprobs = model(ids[None]).logits[0, :-1].float().log_softmax(-1)
        expected = logprobs.gather(-1, ids[1:, None])[:, 0]
        differences.append((torch.tensor(answer["logprobs"]) - expected).abs())
        assert answer["ids"][: len(prompt)] == prompt and len(answer["ids"]) == len(prompt) + NEW_TOKENS
        generated = slice(len(prompt) - 1, None)
        # a token of (almost) the same probability is as good: bfloat16 has ties
        greedy.append(logprobs[generated].max(-1).values - expected[generated] <= 10 * BOUNDS[dtype])
    return torch.cat(differences).mean().item(), torch.cat(greedy).float().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(all_served, folders, name, dtype):
    difference, greedy = disagreement(folders(name, dtype), dtype, all_served[dtype][name])
    assert greedy >= SAME_GREEDY[dtype]
    assert difference < BOUNDS[dtype]


@pytest.mark.slow
def test_threshold_is_not_dropped(all_served):
    """vLLM's fuser knows topk(softmax(linear)) and would put a plain router in the place of ours."""
    with_it, without = (all_served["float32"][name]["answers"] for name in ("threshold", "threshold_dropped"))
    shared = [length - 1 for length in PROMPT_LENGTHS]
    gaps = [
        abs(a - b)
        for x, y, n in zip(with_it, without, shared)
        for a, b in zip(x["logprobs"][:n], y["logprobs"][:n])
    ]
    assert sum(gaps) / len(gaps) > 0.01


@pytest.mark.slow
def test_compiled(served, folders):
    names = ["top_k", "threshold_per_expert", "removed", "dense", "heads"]
    lines = served(names, "float32", eager=False)
    for name in names:
        difference, greedy = disagreement(folders(name, "float32"), "float32", lines[name])
        assert greedy == 1 and difference < BOUNDS["float32"], name


@pytest.mark.slow
def test_fused(served, folders):
    covered, refused = ["top_k", "top_k_per_layer", "l2"], ["threshold", "removed", "gelu"]
    lines = served(covered + refused, "bfloat16", experts="fused")
    for name in covered:
        difference, greedy = disagreement(folders(name, "bfloat16"), "bfloat16", lines[name])
        assert greedy >= SAME_GREEDY["bfloat16"] and difference < BOUNDS["bfloat16"], name
    for name in refused:
        assert "DSMOE_VLLM_EXPERTS=fused can't run this model" in lines[name]["error"], name


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(sys.argv[3:], sys.argv[1], sys.argv[2] == "eager")
