"""Nothing is made on the CPU that belongs where the model is: the same numbers with all on an emulated accelerator."""

import copy

import accelerate
import pytest
import safetensors.torch
import torch
from other_device import DEVICE, Elsewhere, accelerator, put

from dsmoe import DSMoEForCausalLM
from dsmoe.sparsify import calibrate
from dsmoe.trainer.loop import TrainingRun, first_model

MOA = {"num_attention_experts": 2, "num_key_value_heads": 2, "head_dim": 8, "qk_norm": "per_head"}
TOP_2 = {"policy": "top_k", "k": 2}
IDS = torch.arange(24).view(2, 12) % 11
KINDS = {
    "dense twin": {"kind": "dense", "num_experts": 1},
    "all experts": {},
    "the recipe": {
        "gate_normalization": "l2",
        "normalize_embeddings": True,
        "qk_norm": "full",
        "gate_constant": 0.5,
    },
    "top-K": {"mlp_routing": TOP_2},
    "threshold": {"mlp_routing": {"policy": "threshold", "threshold": 0.9}},
    "top-p": {"mlp_routing": {"policy": "top_p", "top_p": 0.5}},
    "at most K": {"mlp_routing": {"policy": "threshold_top_k", "threshold": 0.9, "k": 2}},
    "SMoE": {"kind": "smoe", "mlp_routing": TOP_2, "gate_normalization": "renormalized"},
    "gelu": {"mlp_type": "gelu", "mlp_routing": TOP_2},
    "attention experts": MOA,
    "attention experts, sparse": {**MOA, "attention_routing": {"policy": "top_k", "k": 1}},
}


def on_cpu(tensor):
    return tensor.held if isinstance(tensor, Elsewhere) else tensor


def test_the_emulation_refuses_what_a_gpu_would():
    with accelerator():
        x, y = torch.ones(3, device=DEVICE), torch.ones(3)
        assert (x + 1.0 + torch.tensor(2.0)).device.type == DEVICE  # numbers may lie anywhere
        with pytest.raises(AssertionError, match="add: a tensor of elsewhere and one of the CPU"):
            x + y
        with pytest.raises(AssertionError, match="add_: a tensor of elsewhere and one of the CPU"):
            torch.tensor(0.0).add_(x.sum())  # a number of the CPU takes nothing in
        assert type(y.to(DEVICE)) is Elsewhere and type(x.cpu()) is torch.Tensor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept_alone", [False, True])
def test_losses_and_gradients(tiny_model, monkeypatch, kind, kept_alone):
    if kept_alone:  # experts this narrow are otherwise computed as one wide product
        monkeypatch.setattr("dsmoe.model.grouped.wide_is_faster", lambda *_: False)
    model = tiny_model(**KINDS[kind]).train()
    expected = model(IDS, labels=IDS, use_cache=False)
    expected.loss.backward()
    with accelerator():
        other = put(copy.deepcopy(model))
        other.zero_grad()
        ids = IDS.to(DEVICE)
        found = other(ids, labels=ids, use_cache=False)
        assert found.loss.device.type == DEVICE
        found.loss.backward()
    torch.testing.assert_close(on_cpu(found.loss), expected.loss, rtol=1e-12, atol=1e-12)
    for (name, ours), theirs in zip(other.named_parameters(), model.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(on_cpu(ours.grad), theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["all experts", "top-K", "threshold", "attention experts, sparse"])
def test_generation(tiny_model, kind):
    model = tiny_model(**KINDS[kind])
    expected = model.generate(IDS, max_new_tokens=6, do_sample=False)
    with accelerator():
        found = put(copy.deepcopy(model)).generate(IDS.to(DEVICE), max_new_tokens=6, do_sample=False)
    assert torch.equal(on_cpu(found), expected)


@pytest.mark.parametrize("kept", [None, [[0, 1, 3], [0, 1, 2]]])
def test_calibration(tiny_model, kept):
    model = tiny_model(dtype=torch.float32, mlp_kept_experts=kept)
    batches = [
        {"input_ids": IDS[:, :-1], "shift_labels": IDS[:, 1:], "attention_mask": torch.ones_like(IDS[:, 1:])}
    ]
    expected = calibrate(model, batches, curve_tokens=20).at_share(0.5)
    with accelerator():
        found = calibrate(put(copy.deepcopy(model)), batches, curve_tokens=20).at_share(0.5)
    for part, policies in expected.policies.items():
        for ours, theirs in zip(found.policies[part], policies, strict=True):
            assert ours == {name: pytest.approx(value, abs=1e-4) for name, value in theirs.items()}


RUNS = {
    "dense": {"model.kind": "dense", "model.num_experts": 1, "optim.schedule": "wsd"},
    "smoe": {
        "model.kind": "smoe", "model.mlp_routing": TOP_2, "router_loss.load_balancing_coef": 0.01,
        "router_loss.router_z_loss_coef": 0.01, "router_loss.mi_statistics": "running",
    },
    "masked": {
        "mask_phase.fraction": 0.5, "mask_phase.targets": [0.25, 0.5],
        "router_loss.load_balancing_coef": 0.01, "distillation.coef": 0.5, "data.isolate_documents": True,
    },
    "attention experts": {
        "model.num_attention_experts": 2, "model.qk_norm": "per_head", "router_loss.router_mi_loss_coef_attention": 0.1,
        "train.gradient_checkpointing": True, "router_loss.mi_control": "layer", "router_loss.mi_control_threshold": 0.9,
    },
}  # fmt: skip


@pytest.fixture
def there(monkeypatch):
    """Makes the trainer take `DEVICE` for its own."""

    class There(accelerate.Accelerator):
        device = property(lambda _: torch.device(DEVICE, 0))

    save_model, save_file = DSMoEForCausalLM.save_pretrained, safetensors.torch.save_file

    def save_held_model(model, folder, state_dict=None):
        weights = {name: on_cpu(value) for name, value in (state_dict or model.state_dict()).items()}
        save_model(DSMoEForCausalLM(model.config), folder, state_dict=weights)

    def save_held(tensors, path):
        save_file({name: on_cpu(value) for name, value in tensors.items()}, path)

    # safetensors takes a GPU's tensors as they are; it can't look into these
    monkeypatch.setattr(DSMoEForCausalLM, "save_pretrained", save_held_model)
    monkeypatch.setattr("dsmoe.checkpoint.folder.save_file", save_held)
    monkeypatch.setattr("dsmoe.trainer.launch.Accelerator", There)
    # a model that is brought to a GPU keeps its parameters, which the optimiser has by then; these it can't keep
    monkeypatch.setattr("dsmoe.trainer.loop.first_model", lambda *given: put(first_model(*given)))
    with accelerator():
        yield


@pytest.mark.parametrize("name", RUNS)
def test_a_training_run_that_breaks_off(train, monkeypatch, name, request):
    settings = {**RUNS[name], "train.save_every_steps": 3}
    expected = train("cpu", **settings)
    request.getfixturevalue("there")
    with monkeypatch.context() as patch:
        one_step = TrainingRun._one_step

        def interrupted(self, total):
            if self.step == 5:
                raise KeyboardInterrupt
            return one_step(self, total)

        patch.setattr(TrainingRun, "_one_step", interrupted)
        assert train("elsewhere", **settings).status == 130
    found = train("elsewhere", **settings, **{"train.resume": True})
    assert found.status == expected.status == 0
    assert found.losses() == pytest.approx(expected.losses(), rel=1e-4)
