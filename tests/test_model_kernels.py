"""The kernels of the gated activation against its definition in float64, and the choice between them."""

import logging
import math
import os
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from dsmoe.errors import UserError
from dsmoe.model.kernels import (
    build,
    check,
    compiled,
    cpp,
    eager,
    gated_activation,
    gated_activation_backward,
    reset_kernel,
    selected_kernel,
    selection,
)
from dsmoe.model.kernels.check import KernelUnavailable
from dsmoe.model.wide import wide_experts

# largest error over the largest value
TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1.5e-2}
MLP_TYPES = ("swiglu", "gelu")


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch):
    monkeypatch.delenv(selection.VARIABLE, raising=False)
    reset_kernel()
    yield
    reset_kernel()


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """A machine with no compiler and an empty cache."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def cpp_kernel():
    try:
        cpp.probe("cpu")
    except check.KernelUnavailable as reason:
        pytest.skip(f"the cpp kernel can't be had here: {reason}")
    return cpp


@pytest.fixture(params=["eager", "cpp"])
def kernel(request):
    return eager if request.param == "eager" else request.getfixturevalue("cpp_kernel")


def inputs(num_tokens, num_experts, width, mlp_type, gated=True, dtype=torch.float32, seed=0):
    """Gradient [T, N, F], h [T, N, H] and gates [T, N] or None."""
    generator = torch.Generator().manual_seed(seed)
    h_width = 2 * width if mlp_type == "swiglu" else width
    grad = torch.randn(num_tokens, num_experts, width, generator=generator).to(dtype)
    h = 3 * torch.randn(num_tokens, num_experts, h_width, generator=generator).to(dtype)
    gates = torch.rand(num_tokens, num_experts, generator=generator).to(dtype) if gated else None
    return grad, h, gates


def definition(h, gates, mlp_type):
    """Written out from the formula, for autograd to differentiate."""
    if mlp_type == "swiglu":
        gate, up = h.split(h.shape[-1] // 2, dim=-1)
        act = gate / (1 + torch.exp(-gate)) * up
    else:
        act = h * 0.5 * torch.special.erfc(-h / math.sqrt(2))
    return act if gates is None else act * gates.unsqueeze(-1)


def assert_matches_definition(kernel, grad, h, gates, mlp_type):
    """Result and gradients of a kernel, against autograd through the definition in float64."""
    h64 = h.double().clone().requires_grad_()
    gates64 = None if gates is None else gates.double().clone().requires_grad_()
    result = definition(h64, gates64, mlp_type)
    leaves = (h64,) if gates is None else (h64, gates64)
    expected = [result.detach(), *torch.autograd.grad(result, leaves, grad.double()), result.detach()]
    scales = [reference.abs() for reference in expected]
    if gates is not None:  # a sum over F: its terms may cancel
        scales[2] = (grad.double() * definition(h.double(), None, mlp_type)).abs().sum(-1)

    untouched = [h.clone(), None if gates is None else gates.clone()]
    with torch.no_grad():
        actual = [kernel.forward(h, gates, mlp_type), *kernel.backward(grad.clone(), h, gates, mlp_type)]
    assert (actual[2] is None) == (gates is None)
    for value, reference, scale in zip([v for v in actual if v is not None], expected, scales, strict=True):
        assert value.shape == reference.shape and value.dtype == h.dtype
        if value.numel():
            assert (value.double() - reference).abs().max() / scale.max() < TOLERANCES[h.dtype]
    assert torch.equal(h, untouched[0])
    assert gates is None or torch.equal(gates, untouched[1])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("mlp_type", MLP_TYPES)
@pytest.mark.parametrize("gated", [True, False])
def test_matches_definition(kernel, dtype, mlp_type, gated):
    if kernel is cpp and dtype not in cpp.DTYPES:
        pytest.skip("cpp leaves float64 to eager")
    for num_tokens, num_experts, width in [
        (5, 3, 1),
        (1, 2, 3),
        (4, 1, 17),
        (7, 5, 64),
        (3, 2, 63),
        (2, 4, 8),
        (0, 3, 4),
    ]:
        case = inputs(num_tokens, num_experts, width, mlp_type, gated, dtype)
        assert_matches_definition(kernel, *case, mlp_type)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 6), st.integers(1, 5), st.integers(1, 40)),
    mlp_type=st.sampled_from(MLP_TYPES),
    gated=st.booleans(),
    dtype=st.sampled_from(cpp.DTYPES),
    seed=st.integers(0, 1000),
)
def test_cpp_matches_definition_for_any_shape(cpp_kernel, sizes, mlp_type, gated, dtype, seed):
    assert_matches_definition(cpp_kernel, *inputs(*sizes, mlp_type, gated, dtype, seed), mlp_type)


@pytest.mark.parametrize("mlp_type", MLP_TYPES)
def test_cpp_is_accurate_relative_to_each_value(cpp_kernel, mlp_type):
    """Tails included: the exponential and the normal distribution function are the kernel's own."""
    x = torch.linspace(-12, 12, 4801)[:, None, None]
    h = torch.cat((x, torch.ones_like(x)), -1) if mlp_type == "swiglu" else x
    expected = definition(h.double(), None, mlp_type)
    actual = cpp_kernel.forward(h, None, mlp_type).double()
    # float32 rounds the exponent x^2 / 2 of gelu: 72 * 6e-8
    bound = {"swiglu": 1e-6, "gelu": 6e-6}[mlp_type]
    assert ((actual - expected).abs() <= bound * expected.abs()).all()


@pytest.mark.parametrize("mlp_type", MLP_TYPES)
@pytest.mark.parametrize("dtype", cpp.DTYPES, ids=str)
def test_cpp_extremes_agree_with_eager(cpp_kernel, mlp_type, dtype):
    x = torch.tensor([-1e30, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e30])
    not_finite = torch.tensor([float("inf"), -float("inf"), float("nan")])
    x = torch.cat((x, not_finite))
    h = torch.cat((x, torch.ones_like(x))) if mlp_type == "swiglu" else x
    h = h[None, None].to(dtype)
    actual, expected = (kernel.forward(h, None, mlp_type)[0, 0] for kernel in (cpp_kernel, eager))
    torch.testing.assert_close(actual[:-3], expected[:-3], rtol=1e-2, atol=1e-30)
    # torch's gelu makes NaN of infinity; what matters is that an overflow stays visible
    assert not actual[-3:].isfinite().any()


def test_cpp_rounds_bfloat16_to_nearest_even(cpp_kernel):
    _, h, gates = inputs(9, 4, 33, "swiglu", dtype=torch.bfloat16)
    in_float32 = cpp_kernel.forward(h.float(), gates.float(), "swiglu")
    assert torch.equal(cpp_kernel.forward(h, gates, "swiglu"), in_float32.bfloat16())


def test_cpp_takes_strided_tensors(cpp_kernel):
    grad, h, gates = inputs(6, 4, 5, "swiglu")
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (grad, h, gates)]
    assert not any(x.is_contiguous() for x in strided)
    assert_matches_definition(cpp_kernel, *strided, "swiglu")
    expanded = torch.ones(1, 1, 1).expand(6, 4, 5)
    assert_matches_definition(cpp_kernel, expanded, h, gates, "swiglu")


def test_cpp_gives_the_same_bits_on_several_threads(cpp_kernel, monkeypatch):
    """Rows are independent, so that their split over threads can't show."""
    monkeypatch.setattr(cpp, "_MIN_ELEMENTS_PER_THREAD", 8)
    grad, h, gates = inputs(33, 3, 7, "swiglu")
    results = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(
            (cpp_kernel.forward(h, gates, "swiglu"), *cpp_kernel.backward(grad.clone(), h, gates, "swiglu"))
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("mlp_type", MLP_TYPES)
@pytest.mark.parametrize("h_needs_grad", [True, False])
@pytest.mark.parametrize("gates_need_grad", [True, False, None])
def test_eager_forward_under_autograd(mlp_type, h_needs_grad, gates_need_grad):
    """Its writes into place must not spoil what autograd saved, whichever input needs a gradient."""
    _, h, gates = inputs(4, 3, 5, mlp_type, gates_need_grad is not None, torch.float64)
    h.requires_grad_(h_needs_grad)
    if gates is not None:
        gates.requires_grad_(gates_need_grad)
    expected = definition(h, gates, mlp_type)
    actual = eager.forward(h, gates, mlp_type)
    torch.testing.assert_close(actual, expected)
    assert actual.requires_grad == expected.requires_grad
    leaves = [x for x in (h, gates) if x is not None and x.requires_grad]
    if leaves:
        weight = torch.randn(expected.shape, dtype=torch.float64)
        torch.testing.assert_close(
            torch.autograd.grad((actual * weight).sum(), leaves),
            torch.autograd.grad((expected * weight).sum(), leaves),
        )
    with torch.no_grad():
        before = h.clone()
        torch.testing.assert_close(eager.forward(h, gates, mlp_type), expected.detach())
        assert torch.equal(h, before)


@pytest.mark.parametrize("mlp_type", MLP_TYPES)
@pytest.mark.parametrize("gated", [True, False])
def test_gradcheck_of_wide_experts(mlp_type, gated):
    _, up, gates = inputs(3, 2, 3, mlp_type, gated, torch.float64)
    generator = torch.Generator().manual_seed(1)
    x, up, down = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 4), (2, up.shape[-1], 4), (2, 3, 4))
    )
    if gated:
        gates.requires_grad_()
    assert torch.autograd.gradcheck(wide_experts, (x, gates, up, down, mlp_type))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_experts_agrees_between_cpp_and_eager(cpp_kernel, monkeypatch, dtype):
    generator = torch.Generator().manual_seed(2)
    shapes = ((6, 8), (6, 3), (3, 10, 8), (3, 5, 8))
    leaves = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
    results = {}
    for name in ("cpp", "eager"):
        monkeypatch.setenv(selection.VARIABLE, name)
        reset_kernel()
        y = wide_experts(*leaves, "swiglu")
        results[name] = (y, *torch.autograd.grad(y.float().square().sum(), leaves))
    for a, b in zip(results["cpp"], results["eager"], strict=True):
        assert (a - b).abs().max() <= (1e-5 if dtype == torch.float32 else 3e-2) * b.abs().max()


@pytest.mark.slow
def test_compile_matches_definition(monkeypatch):
    monkeypatch.setenv(selection.VARIABLE, "compile")
    try:
        assert selected_kernel() == "compile"
    except UserError as reason:
        pytest.skip(str(reason))
    assert_matches_definition(compiled, *inputs(6, 3, 17, "swiglu"), "swiglu")
    with torch._dynamo.config.patch(error_on_recompile=True):  # the code must serve any number of tokens
        assert_matches_definition(compiled, *inputs(9, 3, 17, "swiglu"), "swiglu")


def test_auto_takes_cpp(cpp_kernel, caplog):
    assert selected_kernel() == selected_kernel("cpu") == "cpp"
    assert not caplog.records


def test_auto_falls_back_to_eager_without_a_compiler(no_compiler, caplog):
    grad, h, gates = inputs(4, 3, 5, "swiglu")
    with caplog.at_level(logging.WARNING):
        result = gated_activation(h, gates, "swiglu")
        gradients = gated_activation_backward(grad.clone(), h, gates, "swiglu")
    assert selected_kernel() == "eager"
    assert torch.equal(result, eager.forward(h, gates, "swiglu"))
    for a, b in zip(gradients, eager.backward(grad.clone(), h, gates, "swiglu"), strict=True):
        assert torch.equal(a, b)
    (record,) = caplog.records
    message = record.getMessage()
    assert "eager instead of cpp" in message and "no C++ compiler" in message and "\n" not in message


def test_processes_of_one_machine_warn_once(no_compiler, caplog, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert selected_kernel() == "eager"
    assert not caplog.records


def test_a_compiler_that_fails_is_reported(no_compiler, monkeypatch, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'file.cpp:1: error: no such thing' >&2\nexit 1\n", encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", "broken -v")
    monkeypatch.setenv(selection.VARIABLE, "cpp")
    with pytest.raises(UserError, match=r"broken failed: .*no such thing"):
        selected_kernel()
    monkeypatch.setenv("CXX", "absent")
    with pytest.raises(UserError, match="CXX names, 'absent'"):
        selected_kernel()
    assert not list((tmp_path / "cache" / "dsmoe").iterdir()), "nothing may be left in the cache"


def test_a_compiler_that_hangs_is_ended_with_all_its_processes(no_compiler, monkeypatch, tmp_path):
    """What a compiler's driver starts would run on without it, and a second attempt take as long again."""
    compiler, tries = tmp_path / "slow", tmp_path / "tries"
    path = os.environ["PATH"]
    compiler.write_text(
        f"#!/bin/sh\necho try >> {tries}\nPATH=/usr/bin:/bin\nsleep 60 &\necho $! > {tmp_path}/child\nwait\n",
        encoding="utf-8",
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path}:/usr/bin:/bin")
    monkeypatch.setenv("CXX", "slow")
    monkeypatch.setenv(selection.VARIABLE, "cpp")
    monkeypatch.setattr(build, "_COMPILE_SECONDS", 1)
    with pytest.raises(UserError, match="slow failed: it took longer than 1 seconds"):
        selected_kernel()
    assert tries.read_text(encoding="utf-8").splitlines() == ["try"]
    child = Path(f"/proc/{(tmp_path / 'child').read_text(encoding='utf-8').strip()}/stat")
    gone = time.monotonic() + 10
    while child.exists() and ") Z" not in child.read_text(encoding="utf-8") and time.monotonic() < gone:
        time.sleep(0.05)
    assert not child.exists() or ") Z" in child.read_text(encoding="utf-8")


def test_a_damaged_library_is_replaced_and_then_kept(cpp_kernel, monkeypatch, tmp_path):
    try:
        build.compiler()
    except check.KernelUnavailable as reason:
        pytest.skip(str(reason))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    library = build.cache_path(cpp.SOURCE)
    library.write_bytes(b"half a library")
    cpp.probe("cpu")
    assert [library] == list(library.parent.iterdir())
    monkeypatch.setenv("PATH", str(tmp_path))
    cpp.probe("cpu")  # now no compiler is needed


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="permissions don't bind this user")
@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("no home directory")])
def test_a_folder_that_cannot_be_had_is_no_kernel(monkeypatch, error):
    """A full disk, or a user without a home: eager kernels then, after a warning."""

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(build, "cache_path", fail)
    with pytest.raises(KernelUnavailable, match=str(error)):
        build.load_library(Path("any.cpp"), pytest.fail)


def test_a_cache_that_cannot_be_written_does_no_harm(cpp_kernel, monkeypatch, tmp_path):
    tmp_path.chmod(0o500)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    cpp.probe("cpu")


def test_a_kernel_with_wrong_numbers_is_refused():
    def forward(h, gates, mlp_type):
        return eager.forward(h, gates, mlp_type) * 1.001

    with pytest.raises(check.KernelUnavailable, match="its numbers are wrong"):
        check.against_eager(forward, eager.backward, "cpu", (torch.float32,))


def test_unknown_kernel(monkeypatch):
    monkeypatch.setenv(selection.VARIABLE, "triton")
    with pytest.raises(UserError, match=r"DSMOE_KERNEL='triton'.*auto, eager, compile, cpp"):
        selected_kernel()


def test_cpp_is_refused_for_cuda(monkeypatch):
    monkeypatch.setenv(selection.VARIABLE, "cpp")
    with pytest.raises(UserError, match="CPU only"):
        selected_kernel("cuda")


def test_what_only_eager_can_do_goes_there(monkeypatch):
    """float64, meta tensors, recorded graphs and dispatch modes, whatever kernel is chosen."""

    def fail(*args):
        raise AssertionError("not for this kernel")

    monkeypatch.setattr(cpp, "forward", fail)
    monkeypatch.setitem(selection._kernel_of_device, "cpu", cpp)
    _, h, gates = inputs(4, 3, 5, "swiglu")
    assert gated_activation(h.double(), gates.double(), "swiglu").dtype == torch.float64
    assert gated_activation(h.to("meta"), gates.to("meta"), "swiglu").shape == (4, 3, 5)
    assert gated_activation(h.clone().requires_grad_(), gates, "swiglu").requires_grad
    assert gated_activation(h, gates.clone().requires_grad_(), "swiglu").requires_grad
    with FlopCounterMode(display=False):
        gated_activation(h, gates, "swiglu")
    with pytest.raises(AssertionError, match="not for this kernel"):
        gated_activation(h, gates, "swiglu")


def test_definition_agrees_with_torch():
    _, h, _ = inputs(3, 2, 5, "swiglu", dtype=torch.float64)
    gate, up = h.chunk(2, -1)
    torch.testing.assert_close(definition(h, None, "swiglu"), functional.silu(gate) * up)
    torch.testing.assert_close(definition(h, None, "gelu"), functional.gelu(h))
