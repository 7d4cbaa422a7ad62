"""Generation with a `Decoder`: the own loop, and the one that transformers' `generate` calls.

Shapes: B batch, S positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation import GenerateDecoderOnlyOutput

from dsmoe.errors import UserError
from dsmoe.model.generation.backend import is_available, tell_once
from dsmoe.model.generation.decoder import Decoder, left_padding
from dsmoe.model.generation.plan import uncovered
from dsmoe.model.generation.sampling import Sampling

# what `generate` of transformers may hand over besides its own arguments
_KNOWN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
    decoder: Decoder | None = None,
) -> Tensor:
    """Continue prompts, greedily or by sampling.

    Args:
        model: a DSMoEForCausalLM.
        input_ids: [B, S] int64.
        max_new_tokens: at most so many more.
        attention_mask: [B, S], 0 on padding on the left; None: no padding.
        temperature: 0: greedy. This and the next two: see `Sampling`.
        top_k: as above.
        top_p: as above.
        eos_token_id: tokens that end a sequence; None: the config's, if it has one; []: none.
        pad_token_id: what follows the end in a batch; None: the config's, or else the first of `eos_token_id`.
        seed: of the draws; None: torch's own generator.
        decoder: one made before for this model, of this batch size and with enough slots; its cache is used again.

    Returns:
        [B, S + new] int64: prompts and continuations. It ends where all sequences have ended.

    Raises:
        UserError: arguments out of range, or more tokens than a given decoder has slots for.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    sampling = Sampling(temperature, top_k, top_p)
    batch, length = input_ids.shape
    total = length + max_new_tokens
    if decoder is None:
        decoder = Decoder(model, total - 1, batch)  # the last token's keys and values are never needed
    elif decoder.max_length < total - 1:
        raise UserError(
            f"{total - 1} tokens don't fit; the decoder's cache has room for {decoder.max_length}"
        )
    ends = _end_tokens(model, eos_token_id, input_ids)
    pad = _pad_token(model, pad_token_id, ends)
    generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
    out = torch.cat([input_ids, input_ids.new_full((batch, max_new_tokens), pad)], 1)
    running = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
    logits = decoder.prefill(input_ids, attention_mask)
    for position in range(length, total):
        tokens = sampling.choose(logits, generator).to(out.device)
        if ends is not None:
            tokens = torch.where(running, tokens, pad)
            running &= ~torch.isin(tokens, ends)
        out[:, position] = tokens
        if position + 1 == total or (ends is not None and not running.any()):
            break
        logits = decoder.step(tokens)
    return out[:, : position + 1]


def _end_tokens(model: Any, given: int | Sequence[int] | None, input_ids: Tensor) -> Tensor | None:
    ends = model.config.eos_token_id if given is None else given
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    return torch.tensor(ends, dtype=torch.int64, device=input_ids.device) if ends else None


def _pad_token(model: Any, given: int | None, ends: Tensor | None) -> int:
    if given is None:
        given = model.config.pad_token_id
    return given if given is not None else 0 if ends is None else int(ends[0])


def sample_of_transformers(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """The loop of transformers' `generate` for greedy search and sampling, around a `Decoder`.

    Processors, stopping criteria, streamers and returned scores and logits are those of transformers.

    Returns:
        What `GenerationMixin._sample` returns; None where it does not cover the arguments or the model: beams and
        assistants (which have loops of their own), a cache that was given or is not the default one, positions that
        don't count a sequence's tokens from 0, embeddings that were given, wanted attentions or hidden states, chunks
        of the prompt, or no C++ step.
    """
    mask = model_kwargs.get("attention_mask")
    if synced_gpus or not _is_covered(model, input_ids, stopping_criteria, generation_config, model_kwargs):
        return None
    slots = max(stopping_criteria.max_length - 1, input_ids.shape[1])
    try:
        decoder = Decoder(model, slots, input_ids.shape[0], "cpp")
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        # no memory for it; transformers' own cache grows with what is generated
        tell_once(f"a cache of {slots:,} slots doesn't fit into memory")
        return None
    as_dict = generation_config.return_dict_in_generate
    keeps_scores, keeps_logits = (
        as_dict and wanted for wanted in (generation_config.output_scores, generation_config.output_logits)
    )
    all_scores: tuple[Tensor, ...] | None = () if keeps_scores else None
    all_logits: tuple[Tensor, ...] | None = () if keeps_logits else None
    pad = generation_config._pad_token_tensor
    has_end = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    running = torch.ones(input_ids.shape[0], dtype=torch.bool)
    logits = decoder.prefill(input_ids, mask)
    while True:
        if len(logits_processor) or as_dict:
            logits = logits.clone()  # the next step overwrites them
        scores = logits_processor(input_ids, logits)
        if all_scores is not None:
            all_scores += (scores,)
        if all_logits is not None:
            all_logits += (logits,)
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        else:
            tokens = scores.argmax(-1)
        if has_end:
            tokens = torch.where(running, tokens, pad)
        input_ids = torch.cat([input_ids, tokens[:, None]], -1)
        if streamer is not None:
            streamer.put(tokens)
        running = running & ~stopping_criteria(input_ids, all_scores)
        if not running.any():
            break
        logits = decoder.step(tokens)
    if streamer is not None:
        streamer.end()
    if not as_dict:
        return input_ids
    returned: dict[str, Any] = {"sequences": input_ids, "scores": all_scores, "logits": all_logits}
    return GenerateDecoderOnlyOutput(**returned, past_key_values=decoder.cache)


def _is_covered(
    model: Any,
    input_ids: Tensor,
    stopping_criteria: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
) -> bool:
    cache = model_kwargs.get("past_key_values")
    own_cache = cache is None or (
        type(cache) is DynamicCache
        and cache.get_seq_length() == 0
        and not cache.offloading
        and not getattr(cache, "_is_user_defined", False)
    )
    given = {name for name, value in model_kwargs.items() if value is not None}
    wants_more = generation_config.return_dict_in_generate and (
        generation_config.output_attentions or generation_config.output_hidden_states
    )
    if not (own_cache and model_kwargs.get("use_cache") and given <= _KNOWN) or wants_more:
        return False
    if any(getattr(generation_config, name, None) for name in ("prefill_chunk_size", "is_assistant")):
        return False
    if stopping_criteria.max_length is None or not input_ids.is_cpu or input_ids.shape[1] < 1:
        return False
    mask = model_kwargs.get("attention_mask")
    try:
        left_padding(mask, input_ids)
    except UserError:
        return False
    if not _positions_are_usual(model_kwargs.get("position_ids"), mask, input_ids):
        return False
    reason = uncovered(model)
    if reason is not None:
        tell_once(reason)
    return reason is None and is_available()


def _positions_are_usual(position_ids: Tensor | None, mask: Tensor | None, input_ids: Tensor) -> bool:
    """Whether they number each sequence's tokens from 0, as transformers has them where none were given.

    The steps count slots instead, padding included: RoPE sees differences alone.
    """
    if position_ids is None:
        return True
    real = torch.ones_like(input_ids) if mask is None else mask.long()
    if position_ids.shape[-1] != input_ids.shape[1]:
        return False
    return bool(((position_ids == real.cumsum(-1) - 1) | (real == 0)).all())
