"""Both loops: the own `generate`, and transformers' `generate` with the lean step under it."""

import pytest
import torch
from transformers import DynamicCache, GenerationMixin
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from dsmoe.errors import UserError
from dsmoe.model import DSMoEForCausalLM, modeling
from dsmoe.model.generation import Decoder, Sampling, backend, generate, loop
from dsmoe.model.generation.plan import uncovered
from dsmoe.model.kernels import reset_kernel, selection

SPARSE = {"mlp_routing": {"policy": "threshold", "threshold": 0.9}, "tie_word_embeddings": False}
BACKENDS = pytest.mark.parametrize("kind", ["cpp", "torch"])


@pytest.fixture(scope="module", autouse=True)
def _available():
    reset_kernel()
    if not backend.is_available():
        pytest.skip("the C++ step can't be had here")


@pytest.fixture
def model(tiny_model):
    return tiny_model(dtype=torch.float32, **SPARSE)


@pytest.fixture
def theirs(monkeypatch):
    """transformers' loop alone."""

    def run(model, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(DSMoEForCausalLM, "_sample", GenerationMixin._sample)
            return model.generate(*args, **kwargs)

    return run


def prompts(batch=1, length=6, seed=0):
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded():
    ids, mask = prompts(3, 8), torch.ones(3, 8, dtype=torch.int64)
    mask[0, :4] = mask[2, :1] = 0
    return ids, mask


@BACKENDS
def test_greedy_tokens_are_those_of_transformers(model, theirs, kind):
    ids, mask = left_padded()
    expected = theirs(model, ids, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)
    made = Decoder(model, 16, 3, kind)
    assert torch.equal(generate(model, ids, 9, attention_mask=mask, decoder=made), expected)
    assert torch.equal(generate(model, ids, 9, attention_mask=mask, decoder=made), expected), (
        "cache used again"
    )
    assert torch.equal(generate(model, ids, 9, attention_mask=mask), expected)


@BACKENDS
def test_sequences_end(model, theirs, kind):
    ids = prompts(3)
    free = generate(model, ids, 8)
    end = free[0, 8].item()  # what the first sequence has as its third new token
    expected = theirs(model, ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
                      eos_token_id=end, pad_token_id=5)  # fmt: skip
    actual = generate(model, ids, 8, eos_token_id=end, pad_token_id=5, decoder=Decoder(model, 14, 3, kind))
    assert torch.equal(actual, expected) and (actual[0, 9:] == 5).all()
    alone = generate(model, ids[:1], 8, eos_token_id=[96, end])
    assert torch.equal(alone, free[:1, :9])
    model.config.eos_token_id = end
    try:
        assert torch.equal(generate(model, ids[:1], 8), alone)
        assert torch.equal(generate(model, ids[:1], 8, eos_token_id=[]), free[:1])
    finally:
        model.config.eos_token_id = None


def test_sampling_is_seeded(model):
    ids = prompts(4)
    options = {"temperature": 1.3, "top_k": 30, "top_p": 0.9}
    first, again, other = (generate(model, ids, 8, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(generate(model, ids, 8, temperature=1.0, top_k=1, seed=3), generate(model, ids, 8))


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.0, -torch.inf, 2.0, -torch.inf, 1.0, -torch.inf]).expand(40_000, -1)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.bincount(Sampling(1.0).choose(logits, generator), minlength=6) / len(logits)
    expected = logits[0].softmax(-1)
    assert not drawn[[1, 3, 5]].any()
    assert ((drawn - expected).abs() <= 4 * (expected * (1 - expected) / len(logits)).sqrt()).all()


def test_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 3.0, 0.0]])
    probs = (logits / 0.5).softmax(-1)
    torch.testing.assert_close(Sampling(0.5).probabilities(logits), probs)
    two = Sampling(0.5, top_k=2).probabilities(logits)[0]
    torch.testing.assert_close(two, torch.cat([probs[0, :2] / probs[0, :2].sum(), torch.zeros(2)]))
    first = Sampling(1.0, top_p=0.6).probabilities(logits)  # 0.64 of the first row
    torch.testing.assert_close(first, torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0]]))
    pair = Sampling(1.0, top_p=0.65).probabilities(logits)[0]
    assert pair.count_nonzero() == 2 and pair.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_bad_options_are_told(model, options, message):
    with pytest.raises(UserError, match=message):
        generate(model, prompts(), **{"max_new_tokens": 2, **options})


def test_a_decoder_that_is_too_small_is_told(model):
    assert generate(model, prompts(), 4, decoder=Decoder(model, 9)).shape == (1, 10)
    with pytest.raises(UserError, match="10 tokens don't fit; the decoder's cache has room for 9"):
        generate(model, prompts(), 5, decoder=Decoder(model, 9))


class Forbid(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores[:, :50] = -torch.inf  # in place, as some do
        return scores


class Long(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 10)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "repetition_penalty": 1.5, "min_new_tokens": 3, "eos_token_id": list(range(60))},
        {"do_sample": False, "logits_processor": LogitsProcessorList([Forbid()])},
        {"do_sample": False, "stopping_criteria": StoppingCriteriaList([Long()])},
    ],
)
def test_transformers_generate_gives_the_same(model, theirs, options, monkeypatch):
    ids, mask = left_padded()
    options = {"attention_mask": mask, "max_new_tokens": 7, "pad_token_id": 0, "return_dict_in_generate": True,
               "output_scores": True, "output_logits": True, **options}  # fmt: skip
    torch.manual_seed(0)
    expected = theirs(model, ids, **options)
    steps = []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda *args: steps.append(1) or step(*args))
    torch.manual_seed(0)
    actual = model.generate(ids, **options)
    assert len(steps) == len(expected.logits) - 1, "the lean step was taken"
    assert torch.equal(actual.sequences, expected.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(
            torch.stack(actual[name]), torch.stack(expected[name]), rtol=1e-4, atol=1e-4
        )
    assert actual.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    options["return_dict_in_generate"] = False
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids, **options), expected.sequences)


def test_streamers_see_every_token(model):
    class Streamer:
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, tokens):
            self.seen += tokens.flatten().tolist()

        def end(self):
            self.ended = True

    streamer, ids = Streamer(), prompts()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, streamer=streamer)
    assert streamer.seen == out[0].tolist() and streamer.ended


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"past_key_values": "given"},
        {"position_ids": 2 * torch.arange(6)[None]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_arguments_take_transformers_loop(model, options, monkeypatch):
    monkeypatch.setattr(loop, "Decoder", None)
    ids = prompts()
    options = dict(options)
    if "past_key_values" in options:
        options["past_key_values"] = DynamicCache(config=model.config)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, **options
    )
    sequences = out if isinstance(out, torch.Tensor) else out.sequences
    assert sequences.shape == (1, 10)


@pytest.mark.parametrize("pre", [False, True])
def test_forward_hooks_see_every_token(model, theirs, pre):
    ids, calls = prompts(), []
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    plain = model.generate(ids, **options)
    mlp = model.model.layers[1].mlp
    register = mlp.register_forward_pre_hook if pre else mlp.register_forward_hook
    hook = register(lambda *args: calls.append(args[1][0].shape[1]))
    assert torch.equal(model.generate(ids, **options), plain)
    assert calls == [6, 1, 1, 1, 1, 1]
    assert torch.equal(generate(model, ids, 6), plain) and len(calls) == 12
    hook.remove()
    model.generate(ids, **options)
    assert len(calls) == 12
    # a hook that changes what it sees
    mlp.register_forward_hook(lambda module, args, out: (0 * out[0], *out[1:]))
    changed = model.generate(ids, **options)
    assert torch.equal(changed, theirs(model, ids, **options)) and not torch.equal(changed, plain)


def test_a_forward_that_was_replaced_is_called(model, theirs):
    ids = prompts()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    projection = model.model.layers[0].self_attn.k_proj
    projection.forward = lambda x: -torch.nn.functional.linear(x, projection.weight)
    assert torch.equal(model.generate(ids, **options), theirs(model, ids, **options))


def test_the_hooks_of_wanted_hidden_states_leave_the_lean_step(model):
    model(prompts(), output_hidden_states=True)
    assert any(layer._forward_hooks for layer in model.model.layers)
    assert uncovered(model) is None


def test_without_the_kernel_transformers_loop_is_taken(model, theirs, monkeypatch):
    ids = prompts()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    expected = theirs(model, ids, **options)
    monkeypatch.setenv(selection.VARIABLE, "eager")
    reset_kernel()
    monkeypatch.setattr(loop, "Decoder", None)
    assert torch.equal(model.generate(ids, **options), expected)
    monkeypatch.undo()
    reset_kernel()


def test_a_limit_that_no_memory_holds_takes_transformers_loop(model, theirs):
    ids = prompts()
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    end = int(theirs(model, ids, **options, max_new_tokens=3)[0, -1])
    options = {**options, "eos_token_id": end, "pad_token_id": 0}
    assert torch.equal(
        model.generate(ids, **options, max_new_tokens=10**12),
        model.generate(ids, **options, max_new_tokens=9),
    )


def test_modeling_says_so():
    assert "sample_of_transformers" in modeling.DSMoEForCausalLM.__doc__
