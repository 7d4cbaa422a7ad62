"""The mixture of attention heads against a naive loop over tokens, experts and heads, in float64."""

import pytest
import torch
from torch import Tensor

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
MOA = {"num_attention_experts": 2, "num_key_value_heads": 2, "head_dim": 8}
POLICIES = [
    {"policy": "dense"},
    {"policy": "top_k", "k": 1},
    {"policy": "threshold", "threshold": 0.9},
    {"policy": "top_p", "top_p": 0.6},
]
LENGTH = 6


def normalized(x, norm):
    return x if norm is None else norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()


def rotated(x, cos, sin):
    """Pairs (i, i + hd / 2) turned by their angle."""
    half = len(x) // 2
    first, second, cos, sin = x[:half], x[half:], cos[:half], sin[:half]
    return torch.cat([first * cos - second * sin, second * cos + first * sin])


def kept_experts(probs_A, policy):
    ranked = probs_A.argsort(descending=True).tolist()
    if policy["policy"] == "top_k":
        return set(ranked[: policy["k"]])
    if policy["policy"] == "threshold":
        return {ranked[0]} | {e for e in ranked if len(ranked) * probs_A[e] > policy["threshold"]}
    if policy["policy"] == "top_p":
        return set(ranked[:1]) if probs_A[ranked[0]] >= policy["top_p"] else set(ranked)
    return set(ranked)


def naive_attention(attention, x_BSD, cos_BSh, sin_BSh, policy, first_real=None) -> Tensor:
    """Expert a has its own W_q and W_o; its head j reads KV head j; every token has keys and values."""
    config, width = attention.config, attention.head_dim
    heads = config.num_key_value_heads
    k_norm = getattr(attention, "k_norm", None)
    q_norm = getattr(attention, "q_norm", None)
    out = []
    for b, x_SD in enumerate(x_BSD):
        cos_Sh, sin_Sh = (t.expand(len(x_BSD), -1, -1)[b] for t in (cos_BSh, sin_BSh))
        start = 0 if first_real is None else first_real[b]
        for s, x_D in enumerate(x_SD):
            probs_A = (attention.router.weight @ x_D).softmax(-1)
            total = torch.zeros_like(x_D)
            for expert in kept_experts(probs_A.detach(), policy):
                results = []
                for j in range(heads):
                    rows = slice(j * width, (j + 1) * width)
                    query = normalized(attention.experts_q_proj[expert, rows] @ x_D, q_norm)
                    query = rotated(query, cos_Sh[s], sin_Sh[s])
                    seen = range(start, s + 1) if s >= start else [s]
                    keys = [
                        rotated(
                            normalized(attention.k_proj.weight[rows] @ x_SD[t], k_norm), cos_Sh[t], sin_Sh[t]
                        )
                        for t in seen
                    ]
                    values = [attention.v_proj.weight[rows] @ x_SD[t] for t in seen]
                    weights = (torch.stack(keys) @ query / width**0.5).softmax(-1)
                    results.append(weights @ torch.stack(values))
                total = total + (
                    config.attention_gate_scale
                    * probs_A[expert]
                    * torch.cat(results)
                    @ attention.experts_o_proj[expert]
                )
            out.append(total)
    return torch.stack(out).view_as(x_BSD)


class Tap:
    """Collects what goes into and comes out of the first layer's attention, over several forwards."""

    def __init__(self, model):
        self.attention = model.model.layers[0].self_attn
        self.inputs, self.cos, self.sin, self.outputs = [], [], [], []
        self.attention.register_forward_hook(self.collect, with_kwargs=True)

    def collect(self, module, args, kwargs, output):
        cos, sin = kwargs["position_embeddings"]
        for found, tensor in zip(
            (self.inputs, self.cos, self.sin, self.outputs), (args[0], cos, sin, output[0])
        ):
            found.append(tensor)

    def tensors(self):
        return [torch.cat(found, dim=1) for found in (self.inputs, self.cos, self.sin, self.outputs)]


def token_ids(batch):
    return torch.randint(1, 97, (batch, LENGTH), generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_model_equals_the_loop(tiny_model, policy, batch, by_token, padded):
    model = tiny_model(**MOA, qk_norm="per_head", attention_routing=policy)
    tap, ids = Tap(model), token_ids(batch)
    first_real = [(2 + b) % 4 if padded else 0 for b in range(batch)]
    mask = (torch.arange(LENGTH) >= torch.tensor(first_real)[:, None]).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    if by_token:
        cache = None
        for s in range(LENGTH):
            given = (
                {"attention_mask": mask[:, : s + 1], "position_ids": positions[:, s : s + 1]}
                if padded
                else {}
            )
            outputs = model(ids[:, s : s + 1], past_key_values=cache, use_cache=True, **given)
            cache = outputs.past_key_values
    else:
        model(ids, **({"attention_mask": mask, "position_ids": positions} if padded else {}))
    x, cos, sin, actual = tap.tensors()
    expected = naive_attention(tap.attention, x, cos, sin, policy, first_real)
    real = mask.bool()
    torch.testing.assert_close(actual[real], expected[real], **CLOSE)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("qk_norm", ["none", "per_head"])
@pytest.mark.parametrize("length", [1, LENGTH])
def test_gradients_equal_the_loop(tiny_model, policy, qk_norm, length):
    model = tiny_model(**MOA, qk_norm=qk_norm, attention_routing=policy)
    attention, batch = model.model.layers[0].self_attn, 1 if length == 1 else 2
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, 32, generator=generator, dtype=torch.float64).requires_grad_()
    cos, sin = model.model.rotary_emb(x, torch.arange(length)[None])
    actual, _, logits = attention(x, position_embeddings=(cos, sin), attention_mask=None)
    expected = naive_attention(attention, x, cos, sin, policy)
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert logits.dtype == torch.float64 and logits.shape == (batch, length, 2)
    cotangent = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    inputs = [x, *attention.parameters()]
    wanted = torch.autograd.grad(expected, inputs, cotangent, allow_unused=True)
    found = torch.autograd.grad(actual, inputs, cotangent, allow_unused=True)
    names = ["x", *(name for name, _ in attention.named_parameters())]
    for name, got, want in zip(names, found, wanted):
        if length > 1:
            assert want.abs().sum() > 0, name
        torch.testing.assert_close(
            got, want if want is not None else torch.zeros_like(got), msg=name, **CLOSE
        )


@torch.no_grad()
def test_eager_and_sdpa_agree(tiny_model):
    ids, mask = token_ids(3), torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, :2] = 0
    for overrides in ({}, {**MOA, "qk_norm": "per_head"}):
        model = tiny_model(**overrides)
        expected = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("eager")
        outputs = model(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
        torch.testing.assert_close(outputs.logits[mask.bool()], expected[mask.bool()], **CLOSE)
        assert [tuple(weights.shape) for weights in outputs.attentions] == [(3, 4, LENGTH, LENGTH)] * 2
        assert len(outputs.hidden_states) == 3


def test_rotary_angles(tiny_model):
    rotary = tiny_model().model.rotary_emb
    cos, sin = rotary(torch.zeros(1, dtype=torch.float64), torch.tensor([[0, 3, 41]]))
    for row, position in enumerate((0, 3, 41)):
        for i in range(4):
            angle = torch.tensor(position * 10000.0 ** (-2 * i / 8), dtype=torch.float64)
            for place in (i, i + 4):
                assert abs(cos[0, row, place] - angle.cos()) < 1e-5
                assert abs(sin[0, row, place] - angle.sin()) < 1e-5
