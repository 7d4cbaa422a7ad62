"""Compiled decoder layers compute what the layers as written compute, and the mask phase stays out of it."""

import functools
import os

import pytest
import torch
import yaml
from torch._dynamo.utils import counters

from dsmoe.config.run import RunConfig
from dsmoe.errors import UserError
from dsmoe.model import set_recompute, use_routing
from dsmoe.trainer import compiled
from dsmoe.trainer.compiled import CompiledModel, settle_compile
from dsmoe.trainer.launch import start

# torch looks at `grad` of what it traces
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
COMPILE = torch.compile


@pytest.fixture(autouse=True)
def _forget():
    yield
    torch._dynamo.reset()
    compiled._probe.cache_clear()


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without its last step, which makes C++ code and takes seconds."""
    monkeypatch.setattr(torch, "compile", functools.partial(COMPILE, backend="aot_eager"))


def gradients(model, ids):
    model.zero_grad()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: tensor.grad for name, tensor in model.named_parameters()}}


SPARSE = {"policy": "top_k", "k": 2}
MODELS = {
    "dense": {"kind": "dense", "num_experts": 1},
    "dsmoe": {"gate_normalization": "l2", "normalize_embeddings": True},
    "recompute": {},
    "checkpointing": {},
    "heads": {"num_attention_experts": 2, "qk_norm": "per_head"},
    "smoe": {"kind": "smoe", "mlp_routing": SPARSE},
    "smoe-heads": {
        "kind": "smoe", "num_attention_experts": 2, "qk_norm": "per_head",
        "attention_routing": {"policy": "top_k", "k": 1}, "mlp_routing": {"policy": "threshold", "threshold": 0.9},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_gradients(tiny_model, traced, name):
    model = tiny_model(**MODELS[name]).train()
    set_recompute(model, name == "recompute")
    if name == "checkpointing":
        # renamed in transformers 5.23
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    batches = [torch.randint(model.config.vocab_size, (3, 8 + seed)) for seed in range(2)]
    expected = [gradients(model, ids) for ids in batches]
    names = [key for key, _ in model.named_parameters()]
    counters.clear()
    layers = CompiledModel(model, "cpu")
    found = [gradients(model, ids) for ids in batches]
    assert counters["stats"]["unique_graphs"] > model.config.num_hidden_layers
    # with all experts a layer is one graph; sparsely it has a break around each sparse part
    assert bool(counters["graph_break"]) == name.startswith("smoe")
    assert [key for key, _ in model.named_parameters()] == names
    for ours, theirs in zip(found, expected):
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, rtol=1e-9, atol=1e-12, msg=key)
    counters.clear()
    with layers.as_written():
        gradients(model, batches[0][:2])
    assert not counters["stats"]


def test_sparse_steps_make_no_graphs(tiny_model, traced):
    """Another number of pairs in each batch, and the same two graphs a layer."""
    model = tiny_model(kind="smoe", mlp_routing={"policy": "threshold", "threshold": 0.9}).train()
    CompiledModel(model, "cpu")
    gradients(model, torch.randint(model.config.vocab_size, (3, 8)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            gradients(model, torch.randint(model.config.vocab_size, (3, 8)))


@pytest.mark.parametrize("heads", [1, 2])
def test_moving_thresholds(tiny_model, traced, heads):
    """A threshold that moves with each step makes one set of graphs, of what doesn't route."""
    qk_norm = "per_head" if heads > 1 else "full"
    model = tiny_model(num_attention_experts=heads, qk_norm=qk_norm).train()
    ids = torch.randint(model.config.vocab_size, (3, 8))
    compiled = CompiledModel(model, "cpu")

    def step(threshold):
        with use_routing(model, *[{"policy": "threshold", "threshold": threshold}] * min(heads, 2)):
            return gradients(model, ids)

    counters.clear()
    with compiled.moving_thresholds():
        found = [step(0.5)]
        # the output layer and one for the attention halves of all layers, which don't route
        assert counters["stats"]["unique_graphs"] == (1 if heads > 1 else 2)
        with torch._dynamo.config.patch(error_on_recompile=True):
            found += [step(0.6), step(0.7)]
    with compiled.as_written():
        expected = [step(threshold) for threshold in (0.5, 0.6, 0.7)]
    for ours, theirs in zip(found, expected):
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, rtol=1e-9, atol=1e-12, msg=key)


def test_many_layers(tiny_model, traced):
    """More layers than torch would compile by itself (8)."""
    model = tiny_model(num_hidden_layers=9).train()
    CompiledModel(model, "cpu")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), use_routing(model):
        gradients(model, torch.randint(model.config.vocab_size, (2, 6)))
    assert counters["stats"]["unique_graphs"] >= 9


@pytest.mark.parametrize("gates", ["softmax", "l2", "renormalized"])
@pytest.mark.parametrize(
    "policy",
    [
        None,
        SPARSE,
        {"policy": "top_p", "top_p": 0.6},
        {"policy": "threshold", "threshold": 0.9},
        {"policy": "threshold_top_k", "threshold": 0.9, "k": 2},
    ],
    ids=lambda policy: policy["policy"] if policy else "dense",
)
def test_the_real_compiler(tiny_model, policy, gates):
    """With L2 gates in float32, a mask made by a scatter was read before it was written."""
    kind = "dsmoe" if policy is None else "smoe"
    sizes = {"num_hidden_layers": 1, "num_experts": 8, "intermediate_size": 128, "hidden_size": 64}
    options = {"kind": kind, "mlp_routing": policy, "gate_normalization": gates, "mlp_gate_scale": 2.0}
    model = tiny_model(**sizes, **options).float().train()
    ids = torch.randint(model.config.vocab_size, (4, 32))
    expected = gradients(model, ids)
    assert expected["model.layers.0.mlp.experts.down_proj"].abs().max() > 0
    CompiledModel(model, "cpu")
    for key, tensor in gradients(model, ids).items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-5, msg=key)


def test_a_run(train, traced):
    """A run with a mask phase."""
    settings = {
        "router_loss__router_mi_loss_coef_mlp": 0.1,
        "mask_phase__fraction": 0.5,
        "train__total_tokens": 6 * 128,
    }
    plain = train("plain", **settings)
    counters.clear()
    run = train("compiled", **settings, train__compile=True)
    assert run.status == 0
    assert counters["stats"]["unique_graphs"] > 1
    assert run.losses() == pytest.approx(plain.losses(), rel=1e-4)
    assert run.summary()["validation_loss_sparse"] == pytest.approx(
        plain.summary()["validation_loss_sparse"], rel=1e-3
    )
    assert run.weights().keys() == plain.weights().keys()


@pytest.mark.parametrize("spoil", [0.0, float("nan")])
def test_a_compiler_that_is_wrong_is_refused(train, monkeypatch, capsys, spoil):
    """No gradient, or none that is a number, for what one piece of the model computes."""

    def compile(function, **given):
        if function.__name__ != "mix":
            return function
        return lambda *given, **named: _spoiled(function(*given, **named), spoil)

    monkeypatch.setattr(torch, "compile", compile)
    run = train("run", train__compile=True)
    assert run.status == 2
    error = capsys.readouterr().err
    assert "gets the gradient of" in error and "train.compile false" in error
    assert not (run.folder / "final").exists()


def _spoiled(found, factor):
    first, *others = found if isinstance(found, tuple) else (found,)
    first = first.detach() + (first - first.detach()) * factor
    return (first, *others) if isinstance(found, tuple) else first


def test_the_check_leaves_a_run_as_it_was(train, traced, monkeypatch):
    """But for the last bits, which the place of a tensor in memory decides."""
    runs = [train("checked", train__compile=True)]
    monkeypatch.setattr(compiled, "check_compiled", lambda *given: None)
    runs.append(train("unchecked", train__compile=True))
    assert runs[0].losses() == pytest.approx(runs[1].losses(), rel=1e-6)


def test_eager_attention(train, traced):
    """The same losses but for rounding, compiled or not."""
    plain = train("plain", train__total_tokens=4 * 128)
    for compile in (False, True):
        run = train(
            f"eager-{compile}", train__total_tokens=4 * 128, train__attention="eager", train__compile=compile
        )
        assert run.status == 0
        assert run.losses() == pytest.approx(plain.losses(), rel=1e-5)
        assert run.losses() != plain.losses()


def test_the_runs_config_says_what_the_launcher_asked_for(train, monkeypatch, traced):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    run = train("run", train__total_tokens=128)
    written = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert written["train"]["compile"] is True
    assert run.summary()["config"]["train"]["compile"] is True


def test_no_compiler(train, monkeypatch, capsys):
    def failing(*args, **kwargs):
        raise RuntimeError("no g++\nanywhere")

    monkeypatch.setattr(torch, "compile", failing)
    assert train("run", train__compile=True).status == 2
    assert "install that, or set train.compile false" in capsys.readouterr().err


def test_the_launchers_wish(monkeypatch, train):
    config = RunConfig()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    accelerator = start(config)
    assert config.train.compile
    # and accelerate leaves the model alone
    assert accelerator.state.dynamo_plugin.backend == "NO"
    assert os.environ["ACCELERATE_DYNAMO_BACKEND"] == "INDUCTOR"
    config.train.sharding = "zero3"
    with pytest.raises(UserError, match="zero3"):
        settle_compile(config.train)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "CUDAGRAPHS")
    with pytest.raises(UserError, match="dynamo_backend 'cudagraphs'"):
        settle_compile(RunConfig().train)
