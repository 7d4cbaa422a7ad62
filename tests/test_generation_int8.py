"""int8 weights: errors within the bound of rounding, the same numbers on both paths, and in the decoding step."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe.errors import UserError
from dsmoe.model.generation import Decoder, backend
from dsmoe.model.int8 import (
    Int8Experts,
    Int8Linear,
    int8_experts,
    portable_int8_experts,
    quantize_int8,
    quantize_rows,
)
from dsmoe.model.kernels import inference_experts, reset_kernel

SPARSE = {"mlp_routing": {"policy": "top_k", "k": 2}}


@pytest.fixture(scope="module", autouse=True)
def _available():
    reset_kernel()
    if not backend.is_available():
        pytest.skip("the kernels can't be had here")


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), depth=st.integers(1, 40), scale=st.floats(1e-6, 1e6), seed=st.integers(0, 99))
def test_rounding_is_within_half_a_step(rows, depth, scale, seed):
    weight = torch.randn(rows, depth, generator=torch.Generator().manual_seed(seed)) * scale
    weight[0, 0] = 0.0
    quantized, scales = quantize_rows(weight)
    assert quantized.dtype is torch.int8 and quantized.abs().max() <= 127
    assert ((quantized * scales[:, None] - weight).abs() <= scales[:, None] * 0.501).all()
    best = weight.abs().argmax(-1)
    assert ((quantized.gather(1, best[:, None]).abs() == 127)[:, 0] | (weight == 0).all(-1)).all()


def test_rows_of_zeros():
    quantized, scales = quantize_rows(torch.zeros(2, 3, 5))
    assert not quantized.any() and (scales == 1).all() and scales.shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mlp_type", ["swiglu", "gelu"])
@pytest.mark.parametrize("tokens", [0, 1, 5, 70])
@pytest.mark.parametrize("masked", [True, False])
def test_the_kernel_equals_the_dequantised_experts(tokens, mlp_type, dtype, masked):
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(3, 26 if mlp_type == "swiglu" else 13, 70, generator=generator) / 8
    down = torch.randn(3, 13, 70, generator=generator)
    gates = torch.rand(tokens, 3, generator=generator)
    mask = gates > 0.4 if masked else None
    x = torch.randn(tokens, 70, generator=generator).to(dtype)
    (up, up_scales), (down, down_scales) = quantize_rows(up), quantize_rows(down)
    given = (x, gates, mask, up, down, mlp_type, up_scales, down_scales)
    wide = (x.double(), gates.double(), mask, up, down, mlp_type, up_scales.double(), down_scales.double())
    expected, tolerance = portable_int8_experts(*wide), 1e-5 if dtype is torch.float32 else 1e-2
    for compute in (inference_experts, int8_experts, portable_int8_experts):
        actual = compute(*given)
        assert actual.dtype is dtype
        assert (actual.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(
    "overrides",
    [
        SPARSE,
        {"kind": "dense", "num_experts": 1, "mlp_type": "gelu"},
        {**SPARSE, "tie_word_embeddings": False, "num_attention_experts": 2, "qk_norm": "none"},
    ],
    ids=["top_k", "dense", "moa"],
)
def test_the_step_equals_the_forward_pass(tiny_model, overrides, linear, dtype):
    model = quantize_int8(tiny_model(dtype=dtype, **overrides), linear)
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    made = Decoder(model, 9, 2)
    assert made.backend == "cpp"
    made.prefill(ids[:, :4])
    for position in range(4, 9):
        actual = made.step(ids[:, position])
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, -1].float()
    assert (actual - expected).norm() <= (1e-4 if dtype is torch.float32 else 3e-2) * expected.norm()


def test_the_model_is_near_the_original(tiny_model):
    """Rounding of 1/254 of the largest weight of a row: some per cent of noise in random weights at most."""
    model = tiny_model(dtype=torch.float32)
    ids = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        quantize_int8(model, linear=True)
        after = model(ids).logits
    assert 1e-5 < (after - before).norm() / before.norm() < 5e-2
    assert sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) < 0.55 * size
    assert all(isinstance(layer.mlp.experts, Int8Experts) for layer in model.model.layers)
    assert all(isinstance(layer.self_attn.o_proj, Int8Linear) for layer in model.model.layers)


def test_it_is_for_inference_alone(tiny_model, tmp_path):
    model = quantize_int8(tiny_model(dtype=torch.float32))
    with pytest.raises(UserError, match="int8 in memory alone"):
        model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="int8 already"):
        quantize_int8(model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cast_leaves_the_scales_alone(tiny_model, dtype):
    """The kernels read them as float32; cast to bfloat16 they were read two at a time, and beyond their end."""
    first = tiny_model(dtype=torch.float32, **SPARSE).eval()
    second = copy.deepcopy(first)
    first = quantize_int8(first.to(dtype), linear=True)
    second = quantize_int8(second, linear=True).to(dtype).half().to(dtype)
    scales = [buffer for name, buffer in second.named_buffers() if name.endswith("scales")]
    assert scales and all(one.dtype is torch.float32 for one in scales)
    ids = torch.arange(1, 9)[None]
    # weights of bfloat16 are rounded before, so that numbers of 8 bits may differ by one
    with torch.no_grad():
        assert apart(first(ids).logits, second(ids).logits) < 0.05
    found = []
    for model in (first, second):
        decoder = Decoder(model, 12, backend="cpp")
        decoder.prefill(ids)
        found.append(decoder.step(ids[:, 0]).clone())
    assert apart(*found) < 0.05


def apart(one, other):
    """Distance relative to the size of the first."""
    return float((one.float() - other.float()).norm() / one.float().norm())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_stay_so(value):
    weight = torch.ones(2, 4)
    weight[0, 1] = value
    quantized, scales = quantize_rows(weight)
    wide = quantized * scales[:, None]
    assert not wide[0].isfinite().all() and torch.equal(wide[1], weight[1])
