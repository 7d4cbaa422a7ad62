"""The serving benchmark's engine "transformers": `generate` of a stock architecture, with its own loop."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.utils import logging

from dsmoe.bench.serving_waves import Clock, in_waves
from dsmoe.model.auto import register


class _FirstTime(LogitsProcessor):
    """Calls a function at the first logits."""

    def __init__(self, function: Clock) -> None:
        self._function: Clock | None = function

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self._function is not None:
            self._function()
            self._function = None
        return scores


class Engine:
    """One model; see `dsmoe.bench.serving_engines` for the form of an engine."""

    def __init__(self, job: dict[str, Any]) -> None:
        register()
        logging.disable_progress_bar()
        torch.set_num_threads(job["threads"])
        self._model = AutoModelForCausalLM.from_pretrained(
            job["source"], dtype=getattr(torch, job["dtype"])
        ).eval()
        self._concurrency = job["concurrency"]
        # a dsmoe model would bring its own loop
        self._more = {"custom_generate": GenerationMixin._sample} if job["native"] else {}

    def run(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> tuple[list[float], list[float]]:
        """Seconds to the first and to the last token of each request."""
        return in_waves(prompts, output_tokens, self._concurrency, self._wave)

    def _wave(self, prompts: Sequence[Sequence[int]], output_tokens: int, first: Clock) -> None:
        ids = torch.tensor(prompts)
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
            min_new_tokens=output_tokens,
            max_new_tokens=output_tokens,
            logits_processor=LogitsProcessorList([_FirstTime(first)]),
            **self._more,
        )

    def facts(self) -> dict[str, Any]:
        """Version and what the engine chose itself."""
        config = self._model.config
        return {
            "engine_version": transformers.__version__,
            "options": {
                "architecture": type(self._model).__name__,
                "attention": config._attn_implementation,
                "experts": getattr(config, "_experts_implementation", None),
            },
        }
