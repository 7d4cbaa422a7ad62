"""The experts' inference kernel against a loop in float64, its fallback, and its use in stock transformers models."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import OlmoeConfig, OlmoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from dsmoe.model import grouped
from dsmoe.model.grouped import grouped_experts
from dsmoe.model.kernels import check, inference, inference_kernel, reset_kernel, selection
from dsmoe.model.wide import wide_experts

# error over the result, both as norms
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
MLP_TYPES = ("swiglu", "gelu")


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch):
    monkeypatch.delenv(selection.VARIABLE, raising=False)
    reset_kernel()
    yield
    reset_kernel()


@pytest.fixture(scope="module")
def kernel():
    try:
        inference.probe("cpu")
    except check.KernelUnavailable as reason:
        pytest.skip(f"the kernel can't be had here: {reason}")
    return inference


@pytest.fixture(params=["cpp", "portable"])
def either(request, monkeypatch):
    """Both ways to compute; the tests say nothing about which is taken."""
    if request.param == "cpp":
        request.getfixturevalue("kernel")
    else:
        monkeypatch.setenv(selection.VARIABLE, "eager")
    return request.param


def weights(num_experts, width, hidden, mlp_type, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h_width = 2 * width if mlp_type == "swiglu" else width
    up = torch.randn(num_experts, h_width, hidden, generator=generator) * hidden**-0.5
    down = torch.randn(num_experts, width, hidden, generator=generator) * width**-0.5
    return up.to(dtype), down.to(dtype)


def tokens(num_tokens, num_experts, hidden, dtype=torch.float32, share=0.4, seed=0):
    """x [T, D], gates [T, N] float32, mask [T, N] with counts from 0 to N; expert 0 is kept by nobody."""
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    gates = torch.rand(num_tokens, num_experts, generator=generator)
    mask = torch.rand(num_tokens, num_experts, generator=generator) < share
    if num_experts > 1:
        mask[:, 0] = False
    return x, gates, mask


def loop(x, gates, mask, up, down, mlp_type):
    """The definition, a token and an expert at a time, in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    x, up, down = x.double(), up.double(), down.double()
    for t in range(x.shape[0]):
        for e in range(up.shape[0]):
            if mask is None or mask[t, e]:
                h = up[e] @ x[t]
                if mlp_type == "swiglu":
                    gate, value = h.chunk(2)
                    h = gate / (1 + torch.exp(-gate)) * value
                else:
                    h = functional.gelu(h)
                out[t] += (1.0 if gates is None else gates[t, e].double()) * (h @ down[e])
    return out


def assert_close(actual, expected, dtype):
    assert actual.shape == expected.shape and actual.dtype == dtype
    assert (actual.double() - expected).norm() <= TOLERANCES[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("mlp_type", MLP_TYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 300])
def test_kept_experts_equal_the_loop(either, num_tokens, mlp_type, dtype):
    up, down = weights(5, 24, 96, mlp_type, dtype)
    x, gates, mask = tokens(num_tokens, 5, 96, dtype)
    expected = loop(x, gates, mask, up, down, mlp_type)
    assert_close(grouped_experts(x, gates, mask, up, down, mlp_type), expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 8, 9])
def test_all_experts_equal_the_loop(either, num_tokens, gated, dtype):
    up, down = weights(4, 10, 64, "swiglu", dtype)
    x, gates, _ = tokens(num_tokens, 4, 64, dtype)
    gates = gates if gated else None
    expected = loop(x, gates, None, up, down, "swiglu")
    assert_close(wide_experts(x, gates, up, down, "swiglu"), expected, dtype)
    down_NDF = down.transpose(1, 2).contiguous()
    again = wide_experts(x, gates, up, down_NDF, "swiglu", down_layout="NDF")
    assert_close(again, expected, dtype)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 60), st.integers(1, 6), st.integers(1, 40), st.integers(1, 150)),
    mlp_type=st.sampled_from(MLP_TYPES),
    dtype=st.sampled_from(list(TOLERANCES)),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape(kernel, sizes, mlp_type, dtype, share, seed):
    num_tokens, num_experts, width, hidden = sizes
    up, down = weights(num_experts, width, hidden, mlp_type, dtype, seed)
    x, gates, mask = tokens(num_tokens, num_experts, hidden, dtype, share, seed)
    expected = check.experts_definition(x, gates, mask, up, down, mlp_type)
    # sizes of one or two may cancel: measured against the sum of magnitudes
    scale = check.experts_definition(x.abs(), gates, mask, up.abs(), down.abs(), mlp_type).norm()
    actual = grouped_experts(x, gates, mask, up, down, mlp_type)
    assert (actual.double() - expected).norm() <= TOLERANCES[dtype] * scale


def test_definition_of_the_probe_equals_the_loop():
    up, down = weights(3, 4, 8, "swiglu")
    x, gates, mask = tokens(5, 3, 8)
    for given_mask in (mask, None):
        given = (x, gates, given_mask, up, down, "swiglu")
        torch.testing.assert_close(check.experts_definition(*given), loop(*given))


@pytest.mark.parametrize("num_tokens", [1, 8, 40, 700])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_threads_share_the_work(kernel, monkeypatch, num_tokens, dtype):
    monkeypatch.setattr(inference, "_MIN_BYTES_PER_THREAD", 1)
    up, down = weights(6, 37, 64, "swiglu", dtype)
    x, gates, mask = tokens(num_tokens, 6, 64, dtype)
    expected = check.experts_definition(x, gates, mask, up, down, "swiglu")
    for threads in (1, 2, 3, 40):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert_close(grouped_experts(x, gates, mask, up, down, "swiglu"), expected, dtype)


def test_large_experts_go_through_in_pieces(kernel):
    """More hidden units than are held at a time, more tokens than are packed at a time."""
    up, down = weights(2, 301, 130, "swiglu")
    x, gates, mask = tokens(210, 2, 130, share=0.9)
    expected = check.experts_definition(x, gates, mask, up, down, "swiglu")
    assert_close(grouped_experts(x, gates, mask, up, down, "swiglu"), expected, torch.float32)


@pytest.mark.parametrize("num_tokens", [4, 40])
def test_strided_tensors(either, num_tokens):
    up, down = weights(5, 6, 32, "swiglu")
    x, gates, mask = tokens(num_tokens, 5, 32)
    expected = loop(x, gates, mask, up, down, "swiglu")
    x, gates, mask = (t.T.contiguous().T for t in (x, gates, mask))
    strided_down = down.transpose(1, 2).contiguous().transpose(1, 2)
    assert not x.is_contiguous() and not strided_down.is_contiguous()
    for some_down in (down, strided_down):
        actual = grouped_experts(x, gates, mask, up, some_down, "swiglu")
        assert_close(actual, expected, torch.float32)


@pytest.mark.parametrize("num_tokens", [2, 50])
def test_removed_experts_are_columns_cut_out(either, num_tokens):
    up, down = weights(6, 6, 32, "swiglu")
    x, gates, mask = tokens(num_tokens, 6, 32)
    left = torch.tensor([1, 2, 5])
    mask[:, [0, 3, 4]] = False
    expected = loop(x, gates, mask, up, down, "swiglu")
    cut = grouped_experts(x, gates[:, left], mask[:, left], up[left], down[left], "swiglu")
    assert_close(cut, expected, torch.float32)
    columns = grouped_experts(x, gates[:, 1:3], mask[:, 1:3], up[1:3], down[1:3], "swiglu")
    assert_close(columns, loop(x, gates[:, 1:3], mask[:, 1:3], up[1:3], down[1:3], "swiglu"), torch.float32)


def test_gates_of_dropped_pairs_are_not_read(either):
    up, down = weights(5, 6, 32, "swiglu")
    x, gates, mask = tokens(20, 5, 32)
    clean = grouped_experts(x, gates, mask, up, down, "swiglu")
    assert torch.equal(grouped_experts(x, gates.where(mask, float("nan")), mask, up, down, "swiglu"), clean)


def test_a_token_does_not_depend_on_the_others(kernel):
    """Its numbers may depend on how many tokens keep an expert, by rounding; never on what those tokens hold."""
    up, down = weights(5, 6, 32, "swiglu")
    x, gates, mask = tokens(30, 5, 32)
    before = grouped_experts(x, gates, mask, up, down, "swiglu")
    x[1:] = float("nan")
    torch.testing.assert_close(grouped_experts(x, gates, mask, up, down, "swiglu")[0], before[0])


@pytest.mark.usefixtures("kept_experts_alone")
def test_kernel_is_taken_for_inference_alone(kernel, monkeypatch):
    calls = []
    compute = inference.forward
    monkeypatch.setattr(inference, "forward", lambda *given: calls.append(1) or compute(*given))
    up, down = weights(3, 4, 8, "swiglu")
    x, gates, mask = tokens(5, 3, 8)

    def taken(x=x, gates=gates, mask=mask, up=up, down=down):
        calls.clear()
        grouped_experts(x, gates, mask, up, down, "swiglu")
        return bool(calls)

    assert taken()
    assert taken(gates=gates.bfloat16())
    assert not taken(up=nn.Parameter(up))
    with torch.no_grad():
        assert taken(up=nn.Parameter(up))
    with torch.inference_mode():
        assert taken(up=nn.Parameter(up))
    for name, value in {"x": x, "down": down, "gates": gates}.items():
        assert not taken(**{name: value.clone().requires_grad_()})
    assert not taken(x=x.double(), up=up.double(), down=down.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not taken()
        assert taken(up=up.bfloat16(), down=down.bfloat16())
    with FlopCounterMode(display=False) as counter:
        assert not taken()
    assert counter.get_total_flops() == 2 * int(mask.sum()) * 3 * 4 * 8
    wide_experts(x, gates, up, down, "swiglu")
    assert calls


def test_kernel_and_fallback_agree(kernel, monkeypatch):
    up, down = weights(5, 24, 96, "swiglu")
    given = (*tokens(33, 5, 96), up, down, "swiglu")
    fast = grouped_experts(*given)
    torch.testing.assert_close(fast, grouped._portable(*given), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_torch_compile_sees_one_operation():
    up, down = weights(3, 4, 8, "swiglu")
    given = (*tokens(5, 3, 8), up, down)
    compiled = torch.compile(
        lambda *tensors: grouped_experts(*tensors, "swiglu") + 1, backend="eager", fullgraph=True
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(*given), grouped_experts(*given, "swiglu") + 1)
    torch.library.opcheck(
        torch.ops.dsmoe.grouped_experts.default, (*given, "swiglu"), test_utils="test_schema"
    )


def test_without_a_compiler_one_line_says_what_is_slower(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    up, down = weights(3, 4, 8, "swiglu")
    x, gates, mask = tokens(5, 3, 8)
    with caplog.at_level(logging.WARNING):
        actual = grouped_experts(x, gates, mask, up, down, "swiglu")
        wide_experts(x, gates, up, down, "swiglu")
    assert inference_kernel() is None
    assert_close(actual, loop(x, gates, mask, up, down, "swiglu"), torch.float32)
    (record,) = caplog.records
    message = record.getMessage()
    assert "no C++ compiler" in message and "slower" in message and "\n" not in message


def stock(family, **more):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 2, "initializer_range": 0.2, **more,
    }  # fmt: skip
    if family == "olmoe":
        return OlmoeForCausalLM(OlmoeConfig(**sizes, intermediate_size=6, pad_token_id=0)).eval()
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, moe_intermediate_size=6, head_dim=8)).eval()


@pytest.mark.parametrize("family", ["olmoe", "qwen3"])
def test_stock_models_run_the_sparse_path(kernel, family, tmp_path):
    model = stock(family)
    ids = torch.arange(1, 41).view(2, 20)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        expected = model(ids).logits
    parameter = model.model.layers[0].mlp.experts.down_proj
    before = parameter.detach().clone()
    model.set_experts_implementation("dsmoe_grouped")
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert parameter is model.model.layers[0].mlp.experts.down_proj
    assert torch.equal(parameter, before) and parameter.transpose(1, 2).is_contiguous()
    generated = model.generate(ids[:1], max_new_tokens=5, do_sample=False)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, experts_implementation="eager")
    assert torch.equal(again.generate(ids[:1], max_new_tokens=5, do_sample=False), generated)


@pytest.mark.parametrize("family", ["olmoe", "qwen3"])
def test_stock_models_have_the_same_gradients(family):
    model = stock(family).double()
    ids = torch.arange(1, 41).view(2, 20)
    gradients = {}
    for name in ("eager", "dsmoe_grouped"):
        model.set_experts_implementation(name)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients[name] = {key: p.grad.clone() for key, p in model.named_parameters()}
    for key, gradient in gradients["eager"].items():
        torch.testing.assert_close(gradients["dsmoe_grouped"][key], gradient, rtol=1e-5, atol=1e-7)


def test_reading_reads_the_kept_experts(kernel):
    up, down = torch.rand(4, 6, 10), torch.rand(4, 3, 10)
    mask = torch.tensor([[True, False, False, False], [True, False, True, False]])
    total = float(up[[0, 2]].sum() + down[[0, 2]].sum())
    assert inference.read_experts(mask, up, down) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_the_grouped_product_of_torch_is_the_loop_over_experts(monkeypatch, layout):
    generator = torch.Generator().manual_seed(0)
    shape = (4, 24, 16) if layout == "out_in" else (4, 16, 24)
    counts = torch.tensor([5, 0, 3, 2])
    found = []
    for used in (False, True):
        monkeypatch.setattr(grouped, "uses_grouped_mm", lambda x, weight, used=used: used)
        generator.manual_seed(0)
        x = torch.randn(10, 16, generator=generator).bfloat16().requires_grad_()
        weight = torch.randn(shape, generator=generator).bfloat16().requires_grad_()
        y = grouped.grouped_linear(x, weight, counts, layout)
        y.backward(torch.randn(y.shape, generator=generator).bfloat16())
        found.append((y, x.grad, weight.grad))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    assert not found[1][2][1].any()


def test_the_grouped_product_is_for_half_precision_on_cuda():
    assert not grouped.uses_grouped_mm(torch.zeros(1, 16).bfloat16(), torch.zeros(2, 16, 16))
    with torch.device("meta"):
        assert not grouped.uses_grouped_mm(torch.zeros(1, 16), torch.zeros(2, 16, 16))
