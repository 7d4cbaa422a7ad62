"""The serving benchmark's engine "llamacpp": llama.cpp through the C interface of llama-cpp-python.

One context holds as many sequences as run at a time, and a step decodes one token of each in one batch, as llama.cpp's
own server does. torch is not loaded here, so that the process's memory is llama.cpp's.
"""

import ctypes
import importlib.metadata
import os
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np

from dsmoe.bench.serving_waves import Clock, in_waves

_BATCH = 2048
_NOISE = 1 << 20


class Engine:
    """One model; see `dsmoe.bench.serving_engines` for the form of an engine."""

    def __init__(self, job: dict[str, Any]) -> None:
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = llama_cpp.llama_load_model_from_file(os.fsencode(job["source"]), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp can't load {job['source']}")
        params = llama_cpp.llama_context_default_params()
        # each sequence has a part of its own of the context, rounded up by llama.cpp
        params.n_ctx = job["concurrency"] * (-(-job["length"] // 256) * 256)
        params.n_seq_max = job["concurrency"]
        params.n_batch = _BATCH
        params.n_threads = params.n_threads_batch = job["threads"]
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp can't make a context (see its own messages)")
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
        self._concurrency, self._vocab = job["concurrency"], job["vocab_size"]
        # argmax(logits + Gumbel noise) draws from the softmax; the noise is drawn once and read from random places
        generator = np.random.default_rng(0)
        self._noise = generator.gumbel(size=_NOISE + self._vocab).astype(np.float32)
        self._generator = generator

    def run(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> tuple[list[float], list[float]]:
        """Seconds to the first and to the last token of each request."""
        return in_waves(prompts, output_tokens, self._concurrency, self._wave)

    def _wave(self, prompts: Sequence[Sequence[int]], output_tokens: int, first: Clock) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        length = len(prompts[0])
        entries = [
            (token, position, sequence, position == length - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        tokens = self._decode(entries)
        first()
        for position in range(length, length + output_tokens - 1):
            tokens = self._decode(
                [(token, position, sequence, True) for sequence, token in enumerate(tokens)]
            )

    def _decode(self, entries: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """Run tokens through the model and draw one after each that asks for it.

        Args:
            entries: token, position, sequence, whether one is drawn after it.
        """
        drawn = []
        for start in range(0, len(entries), _BATCH):
            part = entries[start : start + _BATCH]
            self._batch.n_tokens = len(part)
            for place, (token, position, sequence, wanted) in enumerate(part):
                self._batch.token[place] = token
                self._batch.pos[place] = position
                self._batch.n_seq_id[place] = 1
                self._batch.seq_id[place][0] = sequence
                self._batch.logits[place] = wanted
            status = llama_cpp.llama_decode(self._context, self._batch)
            if status:
                raise RuntimeError(f"llama_decode gave {status}")
            drawn += [self._draw(place) for place, entry in enumerate(part) if entry[3]]
        return drawn

    def _draw(self, place: int) -> int:
        pointer = llama_cpp.llama_get_logits_ith(self._context, place)
        logits = np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self._vocab,))
        offset = int(self._generator.integers(_NOISE))
        return int((logits + self._noise[offset : offset + self._vocab]).argmax())

    def facts(self) -> dict[str, Any]:
        """Version and what the engine chose itself."""
        return {
            "engine_version": f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}",
            "options": {
                "batch_tokens": _BATCH,
                "context_tokens": int(llama_cpp.llama_n_ctx(self._context)),
                "cache_dtype": "float16",
            },
        }
