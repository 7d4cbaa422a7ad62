"""A model, a preallocated cache and the step from one token to the logits of the next.

On CPU a step is one call of C++ that reads the model's weights in place (see `dsmoe.model.kernels.decoder`). Where that
can't be had, and on other devices, it is the model's own forward pass with the same cache: the same numbers, slower.

Shapes: B batch, S positions, V vocabulary, L slots of the cache.
"""

from typing import Any

import torch
from torch import Tensor

from dsmoe.errors import UserError
from dsmoe.model.generation import backend
from dsmoe.model.generation.cache import PreallocatedCache
from dsmoe.model.generation.plan import Plan, uncovered
from dsmoe.model.kernels import decoder as kernel

PARTS = kernel.PARTS
PREFILL_TOKENS = 4096  # of prompts, at a time


class Decoder:
    """Generation one token at a time. `generate` is the loop around it.

    Routing policies are those of the config at the last `prefill`. Nothing is copied: a model whose weights are changed
    in place is seen at once, one whose tensors are replaced at the next `prefill`. With forward hooks on it the steps
    are its own forward pass; hooks that are added to a Decoder's model later see the prefill only.

    Args:
        model: a DSMoEForCausalLM, in evaluation mode; float32 or bfloat16 (weights also int8, see `quantize_int8`) for
            the fast step, any dtype otherwise.
        max_length: L, tokens of a sequence, prompt included, that the cache has room for.
        batch_size: B.
        backend: "cpp", "torch", or None: cpp where it covers the model.
        profile: sum up seconds by part of the model (cpp only).

    Attributes:
        backend: the one in use.
        length: slots that are filled.
        cache: the PreallocatedCache.
        seconds: part to seconds of all steps so far, with `profile`.

    Raises:
        UserError: backend "cpp" can't be had or doesn't cover the model, or sizes are below 1.
    """

    def __init__(
        self,
        model: Any,
        max_length: int,
        batch_size: int = 1,
        backend: str | None = None,
        profile: bool = False,
    ) -> None:
        for name, value in (("max_length", max_length), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        self.model, self.max_length, self.batch_size = model, max_length, batch_size
        self.backend = _checked_backend(model, backend)
        self.cache: PreallocatedCache
        self.length = 0
        self._mask: Tensor | None = None
        self._starts = torch.zeros(batch_size, dtype=torch.int64)
        self._steps: CppSteps | None = None
        self._seconds = torch.zeros(len(PARTS), dtype=torch.float64) if profile else None
        if self.backend == "cpp":
            self._steps = CppSteps(model, batch_size, max_length, self._seconds)
            self.cache = self._steps.cache
        else:
            self.cache = PreallocatedCache(model.config, batch_size, max_length, model.dtype, model.device)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by part."""
        return {} if self._seconds is None else dict(zip(PARTS, self._seconds.tolist()))

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Start anew with a prompt.

        Args:
            input_ids: [B, S] int64.
            attention_mask: [B, S], 0 on padding, which must be on the left; None: no padding.

        Returns:
            [B, V] float32 logits of what follows the prompt.

        Raises:
            UserError: more tokens than the cache has slots, another batch size, or padding elsewhere.
        """
        batch, length = input_ids.shape
        if batch != self.batch_size or length < 1:
            raise UserError(
                f"input_ids is {list(input_ids.shape)}; it must be [{self.batch_size}, at least 1]"
            )
        if length > self.max_length:
            raise UserError(f"the prompt has {length} tokens; the cache has room for {self.max_length}")
        self._starts = left_padding(attention_mask, input_ids)
        padded = bool(self._starts.any())
        self._mask = None
        if padded:
            self._mask = torch.ones(batch, self.max_length, dtype=torch.int64, device=self.model.device)
            self._mask[:, :length] = attention_mask
        self.cache.fill(0)
        if self._steps is not None:
            self._steps.refresh()
        self.length = 0
        rows = max(1, PREFILL_TOKENS // length)
        if rows >= batch or _rows_depend(self.model.config):
            return self._forward(input_ids.to(self.model.device))
        return self._forward_in_parts(input_ids.to(self.model.device), rows)

    @torch.no_grad()
    def step(self, token_ids: Tensor) -> Tensor:
        """Append one token to every sequence.

        Args:
            token_ids: [B] int64.

        Returns:
            [B, V] float32 logits of the next token; the next step may overwrite them.

        Raises:
            UserError: the cache is full, there was no prefill, or a token is outside the vocabulary.
        """
        if not 0 < self.length < self.max_length:
            what = (
                f"the cache is full: it has {self.max_length} slots" if self.length else "call prefill first"
            )
            raise UserError(f"{what}; one more token doesn't fit" if self.length else what)
        if token_ids.shape != (self.batch_size,):
            raise UserError(f"token_ids is {list(token_ids.shape)}; it must be [{self.batch_size}]")
        if self._steps is None:
            return self._forward(token_ids[:, None].to(self.model.device))
        logits = self._steps.step(token_ids, self._starts, self.length)
        self.length += 1
        self.cache.fill(self.length)
        return logits

    def crop(self, length: int) -> None:
        """Forget all tokens but the first ones of each sequence, so that `step` goes on from there.

        Args:
            length: tokens that stay, padding included; one real token of each sequence at least, and at most
                `self.length`.

        Raises:
            UserError: it is out of range.
        """
        least = int(self._starts.max()) + 1
        if not least <= length <= self.length:
            raise UserError(
                f"length is {length}; it must be from {least} (the longest padding and a token) to the {self.length} "
                "tokens that are there"
            )
        self.length = length
        self.cache.fill(length)

    def _forward_in_parts(self, input_ids: Tensor, rows: int) -> Tensor:
        """`_forward` of a prompt, `rows` sequences at a time: what is between layers stays near the cores, and small."""
        batch, length = input_ids.shape
        logits = []
        for first in range(0, batch, rows):
            last = min(batch, first + rows)
            outputs = self.model(
                input_ids=input_ids[first:last],
                attention_mask=None if self._mask is None else self._mask[first:last, :length],
                past_key_values=self.cache.rows(first, last),
                use_cache=True,
                logits_to_keep=1,
            )
            logits.append(outputs.logits[:, -1].float())
        self.length = length
        self.cache.fill(length)
        return torch.cat(logits)

    def _forward(self, input_ids: Tensor) -> Tensor:
        self.length += input_ids.shape[1]
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=None if self._mask is None else self._mask[:, : self.length],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return outputs.logits[:, -1].float()


def _rows_depend(config: Any) -> bool:
    """Whether what a token keeps depends on the other tokens of its batch."""
    layers = range(config.num_hidden_layers)
    policies = [config.routing(part, layer) for part in ("mlp", "attention") for layer in layers]
    return any(policy["policy"] == "threshold_top_k" and policy.get("k") is None for policy in policies)


class CppSteps:
    """The C++ step for one model, with its cache. `Decoder` is what to use."""

    def __init__(self, model: Any, batch_size: int, max_length: int, seconds: Tensor | None = None) -> None:
        self.model, self.seconds = model, seconds
        self.cache = PreallocatedCache(model.config, batch_size, max_length, model.dtype)
        self.logits = torch.empty(batch_size, model.config.vocab_size, dtype=torch.float32, device="cpu")
        self.refresh()

    def refresh(self) -> None:
        """Read addresses and policies again.

        Raises:
            UserError: the model has been changed into one that the step can't run, or that the cache isn't for.
        """
        reason = uncovered(self.model)
        if reason is None and self.model.dtype != self.cache.layers[0].dtype:
            reason = f"its weights were {self.cache.layers[0].dtype} and are {self.model.dtype}"
        if reason is not None:
            raise UserError(f"the model was changed since this decoder was made ({reason}); make another")
        self.plan = Plan(self.model, self.cache)

    def step(self, token_ids: Tensor, starts: Tensor, slot: int) -> Tensor:
        """Logits [B, V] after tokens [B] that go to a slot; the next step overwrites them."""
        token_ids = token_ids.cpu().contiguous()
        low, high = token_ids.aminmax()
        if token_ids.dtype is not torch.int64 or low < 0 or high >= self.logits.shape[1]:
            raise UserError(
                f"token_ids {token_ids.tolist()}: they must be int64 below {self.logits.shape[1]}"
            )
        kernel.step(self.plan.struct, self.plan.dtype, token_ids, starts, slot, self.logits, self.seconds)
        return self.logits


def left_padding(attention_mask: Tensor | None, input_ids: Tensor) -> Tensor:
    """Padding tokens before each sequence, [B] int64 on CPU.

    Raises:
        UserError: zeros anywhere else, or rows of zeros alone.
    """
    batch, length = input_ids.shape
    if attention_mask is None:
        return torch.zeros(batch, dtype=torch.int64)
    if attention_mask.shape != input_ids.shape:
        raise UserError(f"attention_mask is {list(attention_mask.shape)}, input_ids {list(input_ids.shape)}")
    mask = attention_mask.cpu().bool()
    starts = length - mask.sum(-1)
    if not torch.equal(mask, torch.arange(length) >= starts[:, None]) or bool((starts == length).any()):
        raise UserError("attention_mask has zeros after a token; prompts must be padded on the left")
    return starts


def _checked_backend(model: Any, wanted: str | None) -> str:
    if wanted not in (None, "cpp", "torch"):
        raise UserError(f"backend is {wanted!r}; it must be cpp or torch")
    if wanted == "torch" or (wanted is None and model.device.type != "cpu"):
        return "torch"
    reason = uncovered(model)
    if reason is None and backend.is_available():
        return "cpp"
    if wanted == "cpp":
        raise UserError(f"backend 'cpp': {reason or 'the kernel could not be made here (see the warning)'}")
    if reason is not None:
        backend.tell_once(reason)
    return "torch"
