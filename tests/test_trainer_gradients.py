"""The gradient of a step is that of the whole batch, however it is spread over micro-batches and processes."""

import os
import subprocess
import sys

import pytest

# A step of SGD with learning rate 1 on a float64 model: the weights move by exactly the gradient.
SCRIPT = """
import os, sys
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from safetensors.torch import save_file
from dsmoe import DSMoEConfig, DSMoEForCausalLM
from dsmoe.config.run import RouterLossSettings
from dsmoe.trainer.parallel import Replicated
from dsmoe.trainer.step import Stepper

rows = int(sys.argv[1])
several = int(os.environ.get("WORLD_SIZE", "1")) > 1
accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if several else [])
for kind, output in (("dsmoe", sys.argv[2]), ("smoe", sys.argv[3])):
    torch.manual_seed(0)
    model = DSMoEForCausalLM(DSMoEConfig(
        kind=kind, vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_experts=4,
        num_attention_heads=4, num_attention_experts=2, qk_norm="per_head", initializer_range=0.3,
        mlp_routing={"policy": "top_k", "k": 2} if kind == "smoe" else None,
    )).double()
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    ids = torch.randint(50, (8, 12), generator=torch.Generator().manual_seed(1))
    ids[:4] %= 5  # parts of the batch that differ, so that wrong statistics would show
    labels = ids.roll(-1, 1)
    labels[0, 6:] = -100
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    settings = RouterLossSettings(
        router_mi_loss_coef_mlp=1.0, router_mi_loss_coef_attention=0.7, load_balancing_coef=0.5,
        router_z_loss_coef=0.1,
    )
    mine = range(accelerator.process_index * rows, 8, rows * accelerator.num_processes)
    batches = [{"input_ids": ids[i : i + rows], "shift_labels": labels[i : i + rows]} for i in mine]
    Stepper(accelerator, prepared, optimizer, settings, 0.0, None, Replicated(accelerator)).step(batches, 1.0)
    if accelerator.is_main_process:
        save_file({name: before[name] - tensor.detach() for name, tensor in model.named_parameters()}, output)
accelerator.end_training()
"""


def gradients(folder, name, rows, processes):
    """Gradients of a DS-MoE and an SMoE, with `rows` sequences per micro-batch."""
    from safetensors.torch import load_file

    (folder / "step.py").write_text(SCRIPT)
    outputs = [folder / f"{name}-{kind}.safetensors" for kind in ("dsmoe", "smoe")]
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*launcher, str(folder / "step.py"), str(rows), *map(str, outputs)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {f"{path.stem[-5:]}.{key}": value for path in outputs for key, value in load_file(path).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return gradients(tmp_path_factory.mktemp("whole"), "whole", rows=8, processes=1)


@pytest.mark.parametrize(("rows", "processes"), [(2, 1), (2, 2)], ids=["4 micro-batches", "2 processes of 2"])
def test_a_spread_batch_has_the_gradient_of_the_whole(whole, tmp_path, rows, processes):
    found = gradients(tmp_path, "parts", rows, processes)
    assert found.keys() == whole.keys()
    for name, gradient in whole.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() < 1e-6 * gradient.norm(), name


def test_statistics_of_each_part_alone_would_show(whole, tmp_path, monkeypatch):
    """The same comparison with p(e) of each micro-batch alone fails, so the one above can."""
    local = SCRIPT
    for old, new in (
        ("settings, 0.0, None,", "settings, 0.0, RunningMean(0.0),"),
        (
            "from dsmoe.trainer.step",
            "from dsmoe.trainer.statistics import RunningMean\nfrom dsmoe.trainer.step",
        ),
        ("router_z_loss_coef=0.1,", "router_z_loss_coef=0.1, mi_statistics='running',"),
    ):
        assert old in local
        local = local.replace(old, new)
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", local)
    found = gradients(tmp_path, "local", 2, 1)
    routers = [name for name in whole if "router" in name and name.startswith("dsmoe")]
    assert max((found[name] - whole[name]).norm() / whole[name].norm() for name in routers) > 1e-2
