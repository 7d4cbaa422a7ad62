"""The serving benchmark's engine "own": this project's decoder (`dsmoe.model.generation`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dsmoe import __version__
from dsmoe.bench.serving_waves import Clock, in_waves
from dsmoe.checkpoint.pretrained import load_pretrained
from dsmoe.model.generation import Decoder, Sampling
from dsmoe.model.kernels import inference_kernel


class Engine:
    """One model; see `dsmoe.bench.serving_engines` for the form of an engine."""

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        self._model, _ = load_pretrained(Path(job["source"]), getattr(torch, job["dtype"]))
        self._length, self._concurrency = job["length"], job["concurrency"]
        self._decoder: Decoder | None = None
        self._sampling = Sampling(temperature=1.0)

    def run(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> tuple[list[float], list[float]]:
        """Seconds to the first and to the last token of each request."""
        return in_waves(prompts, output_tokens, self._concurrency, self._wave)

    @torch.inference_mode()
    def _wave(self, prompts: Sequence[Sequence[int]], output_tokens: int, first: Clock) -> None:
        if self._decoder is None or self._decoder.batch_size != len(prompts):
            self._decoder = None  # not two caches at a time
            self._decoder = Decoder(self._model, self._length, len(prompts))
        tokens = self._sampling.choose(self._decoder.prefill(torch.tensor(prompts)))
        first()
        for _ in range(output_tokens - 1):
            tokens = self._sampling.choose(self._decoder.step(tokens))

    def facts(self) -> dict[str, Any]:
        """Version and what the engine chose itself."""
        backend = self._decoder.backend if self._decoder else None
        return {
            "engine_version": __version__,
            "options": {"backend": backend, "experts": inference_kernel() or "torch operations"},
        }
