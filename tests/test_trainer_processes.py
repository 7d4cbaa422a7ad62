"""Two processes are one: the same losses and weights, with and without accumulation."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsmoe.trainer.sharded import shard_dim

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ROOT = Path(__file__).resolve().parents[1]
# starting processes takes most of the time, so one launch runs the script for every arm
DRIVER = """
import functools, json, math, pathlib, runpy, sys
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from dsmoe.trainer.loop import TrainingRun
from poison import poison
end_training, one_step = Accelerator.end_training, TrainingRun._one_step
Accelerator.end_training = lambda self: None  # it takes the process group down
# without making C++ code, which takes seconds
torch.compile = functools.partial(torch.compile, backend="aot_eager")
runs = json.loads(open(sys.argv[1]).read())
for number, run in enumerate(runs):
    if number == len(runs) - 1:
        Accelerator.end_training = end_training
    arguments = run["arguments"]
    if "--train.resume" in arguments:  # a finished run is not resumed
        folder = arguments[arguments.index("--train.output_dir") + 1]
        pathlib.Path(folder, "summary.json").unlink(missing_ok=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    TrainingRun._one_step = one_step
    poison(run["broken"], rank=1)
    sys.argv = [sys.argv[0], *arguments]
    try:
        runpy.run_path({script!r}, run_name="__main__")
    except SystemExit as stopped:
        assert stopped.code == 0, stopped.code
"""
# NaN in the gradient of some steps, put there by one of the processes
POISON = """
import math

from dsmoe.trainer.loop import TrainingRun


def poison(steps, rank, setattr=setattr):
    one_step = TrainingRun._one_step

    def poisoned(self, total):
        strategy = self.parallel
        if self.step in steps and self.accelerator.process_index == rank:
            strategy.backward = lambda model, loss: type(strategy).backward(strategy, model, loss * math.nan)
        else:
            vars(strategy).pop("backward", None)
        return one_step(self, total)

    setattr(TrainingRun, "_one_step", poisoned)
"""
LARGE = {
    "router_loss__router_mi_loss_coef_mlp": 3.0,
    "train__total_tokens": 6 * 128,
    "train__save_every_steps": 4,
}
# the mask phase learns from the model itself with all its experts
TAUGHT = {
    "router_loss__load_balancing_coef": 3.0,
    "mask_phase__fraction": 0.5,
    "mask_phase__target_active": 0.5,
    "distillation__coef": 0.5,
}
ARMS = {
    "plain": LARGE,
    "accumulated": LARGE,
    "sharded": {**LARGE, "train__sharding": "fsdp2"},
    "sharded-accumulated": {**LARGE, "train__sharding": "fsdp2"},
    "sharded-compiled": {**LARGE, "train__sharding": "fsdp2", "train__compile": True},
    "compiled": {**LARGE, "train__compile": True},
    "zero2-compiled": {**LARGE, "train__sharding": "zero2", "train__compile": True},
    "smoe": {
        **LARGE,
        "model__kind": "smoe",
        "model__mlp_routing": {"policy": "top_k", "k": 2},
        "router_loss__router_mi_loss_coef_mlp": 0.0,
        "router_loss__load_balancing_coef": 3.0,
        "data__isolate_documents": True,
    },
    "steered": {
        **LARGE,
        "router_loss__mi_control": "layer",
        "router_loss__mi_control_gain": 0.5,
        "mask_phase__fraction": 0.5,
        "mask_phase__targets": [0.5, 0.75, 1.0],
    },
    "sharded-taught": {**LARGE, **TAUGHT, "train__sharding": "fsdp2"},
    "zero2": {**LARGE, "train__sharding": "zero2"},
    "zero3": {**LARGE, "train__sharding": "zero3"},
    "zero2-taught": {**LARGE, **TAUGHT, "train__sharding": "zero2"},
    "zero3-taught": {**LARGE, **TAUGHT, "train__sharding": "zero3"},
    "bf16": {**LARGE, **TAUGHT, "train__precision": "bf16"},
    "sharded-bf16": {**LARGE, **TAUGHT, "train__precision": "bf16", "train__sharding": "fsdp2"},
    "zero2-bf16": {**LARGE, **TAUGHT, "train__precision": "bf16", "train__sharding": "zero2"},
    "zero3-bf16": {**LARGE, **TAUGHT, "train__precision": "bf16", "train__sharding": "zero3"},
    "zero2-broken": {**LARGE, "train__sharding": "zero2"},
    "zero3-broken": {**LARGE, "train__sharding": "zero3"},
}
BROKEN = {name: [2] for name in ARMS if name.endswith("broken")}
BF16 = [name for name in ARMS if name.endswith("bf16")]
ZERO = [name for name in ARMS if name.startswith("zero")]
# these go on from their checkpoints, on as many processes, under this strategy
RESUMED = {
    "plain": "none",
    "sharded": "fsdp2",
    "zero2": "zero3",
    "zero3": "zero2",
    "accumulated": "zero3",
    "steered": "none",
    "zero3-broken": "fsdp2",
}
# sequences per forward and process, in one process and in two
MICRO = {
    "plain": (8, 4),
    "accumulated": (4, 2),
    "sharded": (8, 4),
    "sharded-accumulated": (4, 2),
    "sharded-compiled": (8, 4),
    "compiled": (8, 2),
    "zero2-compiled": (4, 4),
    "smoe": (8, 2),
    "steered": (4, 2),
    "sharded-taught": (4, 2),
    "zero2": (4, 2),
    "zero3": (8, 4),
    "zero2-taught": (8, 4),
    "zero3-taught": (8, 4),
    "bf16": (8, 2),
    "sharded-bf16": (8, 4),
    "zero2-bf16": (4, 2),
    "zero3-bf16": (8, 4),
    "zero2-broken": (8, 4),
    "zero3-broken": (4, 2),
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, train_arguments):
    """Folder with the runs of two processes."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "driver.py").write_text(DRIVER.format(script=str(ROOT / "train" / "pretrain.py")))
    (folder / "poison.py").write_text(POISON)
    chosen = [name for name in ARMS if HAS_DEEPSPEED or name not in ZERO]
    runs = {
        name: {
            "arguments": train_arguments(
                folder / name, **ARMS[name], train__micro_batch_size=MICRO[name][1], train__num_processes=2
            ),
            "broken": BROKEN.get(name, []),
        }
        for name in chosen
    }
    # once more from their checkpoints: the logs must come out as if nothing had happened
    again = [
        {
            **runs[name],
            "arguments": [*runs[name]["arguments"], "--train.resume", "true", "--train.sharding", sharding],
        }
        for name, sharding in RESUMED.items()
        if name in runs and (HAS_DEEPSPEED or not sharding.startswith("zero"))
    ]
    launched = [*runs.values(), *again]
    (folder / "arguments.json").write_text(json.dumps(launched))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE")}
    done = subprocess.run(
        [*launcher, str(folder / "driver.py"), str(folder / "arguments.json")],
        env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 process(es)") == len(launched)
    assert done.stdout.count("resuming step-00000004") == len(again)
    return folder


def needs_deepspeed(name):
    if name in ZERO:
        pytest.importorskip("deepspeed")


def read(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", [name for name in ARMS if name not in [*BROKEN, *BF16]])
def test_two_processes_equal_one(train, two_processes, name):
    from safetensors.torch import load_file

    needs_deepspeed(name)
    alone = {"train__micro_batch_size": MICRO[name][0], "train__compile": False}
    one = train("one", **{**ARMS[name], **alone})
    ours = read(two_processes / name)
    assert [line["step"] for line in ours] == [1, 2, 3, 4, 5, 6, 6]
    losses = [line["lm_loss"] for line in ours if "lm_loss" in line]
    assert losses == pytest.approx(one.losses(), rel=1e-5)
    for line, theirs in zip(ours, one.log()):
        if "router" not in line:
            assert line["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=1e-5)
            continue
        assert line["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        for key, values in line["router"]["mlp"].items():
            expected = torch.tensor(theirs["router"]["mlp"][key])
            torch.testing.assert_close(torch.tensor(values), expected, rtol=1e-4, atol=2e-4, msg=key)
        if name == "steered":
            assert line["mi_coefs"] == pytest.approx(theirs["mi_coefs"], rel=1e-4)
            for target, threshold in line.get("mask_phase", {}).get("thresholds", {}).items():
                assert theirs["mask_phase"]["thresholds"][target] == pytest.approx(threshold, rel=1e-3)
    weights = load_file(two_processes / name / "final" / "model.safetensors")
    assert weights.keys() == one.weights().keys()
    for key, tensor in one.weights().items():
        assert (weights[key] - tensor).norm() <= 1e-3 * tensor.norm(), key
    assert (two_processes / name / "checkpoints" / "step-00000004" / "state.json").exists()


def distance(weights, others):
    """The norm of their difference."""
    return float(sum((weights[key] - tensor).square().sum() for key, tensor in others.items()) ** 0.5)


@pytest.mark.parametrize("name", BF16)
def test_two_processes_in_bf16_are_nearer_to_one_than_bf16_to_float32(train, two_processes, name):
    from safetensors.torch import load_file

    needs_deepspeed(name)
    one = train("one", **ARMS[name], train__micro_batch_size=MICRO[name][0])
    exact = train(
        "exact", **{**ARMS[name], "train__precision": "f32"}, train__micro_batch_size=MICRO[name][0]
    )
    losses = [line["lm_loss"] for line in read(two_processes / name) if "lm_loss" in line]
    assert losses[0] == pytest.approx(one.losses()[0], rel=1e-5)  # no rounding of gradients yet
    assert losses == pytest.approx(one.losses(), rel=5e-4)
    # otherwise float32, which no rounding separates, would pass
    assert one.losses() != pytest.approx(exact.losses(), rel=5e-4)
    weights = load_file(two_processes / name / "final" / "model.safetensors")
    assert weights.keys() == one.weights().keys()
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    # measured: less than a quarter as far
    assert distance(weights, one.weights()) < 0.5 * distance(exact.weights(), one.weights())


def same_files(one, other):
    """Two checkpoints hold tensors of the same names and shapes, and nearly the same numbers."""
    from safetensors.torch import load_file

    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(one / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert tensor.shape == theirs[key].shape and tensor.dtype == theirs[key].dtype, key
            assert (tensor - theirs[key]).norm() <= 1e-3 * tensor.norm(), key
    assert load_file(one / "extra.safetensors").keys() == load_file(other / "extra.safetensors").keys()


@pytest.mark.parametrize("name", ["plain", "sharded", "zero2", "zero3"])
def test_a_checkpoint_is_the_same_whatever_wrote_it(train, two_processes, name):
    needs_deepspeed(name)
    one = train("one", **ARMS[name], train__micro_batch_size=8)
    step = "checkpoints/step-00000004"
    same_files(one.folder / step, two_processes / name / step)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_step_is_skipped_by_all(train, two_processes, name, monkeypatch):
    """One process's NaN leaves the step out in all of them, and no trace in the gradients of the next."""
    needs_deepspeed(name)
    space = {}
    exec(POISON, space)
    space["poison"](BROKEN[name], 0, monkeypatch.setattr)
    one = train("one", **ARMS[name], train__micro_batch_size=MICRO[name][0])
    ours = read(two_processes / name)
    assert [line["step"] for line in ours if "skipped" in line] == [3]
    assert [line["step"] for line in ours if "lm_loss" in line] == [1, 2, 4, 5, 6]
    losses = [line["lm_loss"] for line in ours if "lm_loss" in line]
    assert losses == pytest.approx(one.losses(), rel=1e-5)
    norms = [[line["grad_norm"] for line in lines if "lm_loss" in line] for lines in (ours, one.log())]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_a_step_that_deepspeed_leaves_out_is_told():
    from types import SimpleNamespace

    from dsmoe.errors import UserError
    from dsmoe.trainer.zero import Steps

    engine = SimpleNamespace(step=lambda: None, was_step_applied=lambda: False)
    with pytest.raises(UserError, match=r"guard\.enabled"):
        Steps(engine).step()


def test_parts_of_a_padded_parameter():
    """Seven numbers over three processes: three, three, and one with padding."""
    from types import SimpleNamespace

    from dsmoe.trainer.zero import Zero

    parts = []
    for rank in range(3):
        accelerator = SimpleNamespace(process_index=rank, deepspeed_plugin=SimpleNamespace(zero_stage=3))
        parameter = SimpleNamespace(ds_tensor=torch.empty(3))
        parts.append(Zero(accelerator)._local(torch.arange(1.0, 8.0), parameter).tolist())
    assert parts == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_model_left_whole_is_noticed(stage):
    from types import SimpleNamespace

    from dsmoe.trainer.zero import Zero

    whole, half = torch.empty(1000), torch.empty(500)
    accelerator = SimpleNamespace(num_processes=2, deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    for held, stage_found, right in ((half, stage, True), (whole, stage, False), (half, 0, False)):
        zero = Zero(accelerator)
        zero.names = {"weight": SimpleNamespace(ds_tensor=held, ds_numel=1000)}
        optimizer = SimpleNamespace(
            fp32_partitioned_groups_flat=[held], fp16_groups=[[]], single_partition_of_fp32_groups=[held],
            bit16_groups=[[]],
        )  # fmt: skip
        zero.engine = SimpleNamespace(optimizer=optimizer, zero_optimization_stage=lambda s=stage_found: s)
        if right:
            zero._check_partitioned(1000)
        else:
            with pytest.raises(RuntimeError, match="holds"):
                zero._check_partitioned(1000)


@pytest.mark.parametrize(
    ("sharding", "variables", "words"),
    [
        ("zero2", {"ZERO_STAGE": "3"}, ["train.sharding is zero2", "stage 3"]),
        ("fsdp2", {"ZERO_STAGE": "2"}, ["train.sharding is fsdp2", "MULTI_GPU"]),
        ("none", {"ZERO_STAGE": "1"}, ["zero_stage 1", "2 or 3"]),
        ("none", {"OFFLOAD_PARAM_DEVICE": "cpu"}, ["offload_param_device cpu"]),
        ("zero2", {"CONFIG_FILE": "ds.json"}, ["deepspeed_config_file ds.json"]),
        ("fsdp2", None, ["distributed_type FSDP"]),
    ],
)
def test_launcher_and_run_contradict_each_other(train, monkeypatch, capsys, sharding, variables, words):
    monkeypatch.setenv(f"ACCELERATE_USE_{'FSDP' if variables is None else 'DEEPSPEED'}", "true")
    for name, value in (variables or {}).items():
        monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
    assert train("run", train__sharding=sharding).status == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in words)


def test_the_launchers_stage_decides(monkeypatch):
    from dsmoe.config.run import TrainSettings
    from dsmoe.trainer.zero_setup import launcher_set_aside, settle_sharding

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    for sharding in ("none", "zero3"):
        train = TrainSettings(sharding=sharding)
        settle_sharding(train)
        assert train.sharding == "zero3"
    with launcher_set_aside():
        assert not any(name.startswith(("ACCELERATE_DEEP", "ACCELERATE_GRAD")) for name in os.environ)
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "4"


def test_a_single_process_shards_nothing(train):
    """Whatever is asked for; and a launcher's accumulation doesn't divide the loss once more."""
    short = {**LARGE, "train__micro_batch_size": 4, "train__total_tokens": 2 * 128}
    plain = train("plain", **short)
    asked = train("asked", **short, train__sharding="zero3")
    os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "4"
    launched = train("launched", **short)
    assert plain.log() == asked.log() == launched.log()


@pytest.mark.parametrize(("processes", "micro", "batch"), [(1, 4, 8), (2, 2, 8), (3, 1, 12), (4, 2, 16)])
def test_processes_read_each_sample_once(processes, micro, batch):
    from types import SimpleNamespace

    from dsmoe.trainer.loop import TrainingRun

    for step in (0, 7):
        read = []
        for rank in range(processes):
            run = SimpleNamespace(
                config=SimpleNamespace(
                    train=SimpleNamespace(global_batch_size=batch, micro_batch_size=micro),
                    data=SimpleNamespace(first_sample=0),
                ),
                accelerator=SimpleNamespace(process_index=rank, num_processes=processes, device="cpu"),
                loader=SimpleNamespace(
                    batch=lambda first, count: {"ids": torch.arange(first, first + count)}
                ),
                micro_batches=batch // (micro * processes),
                step=step,
            )
            for part in TrainingRun._batches(run):
                read += part["ids"].tolist()
        assert sorted(read) == list(range(step * batch, (step + 1) * batch))


@pytest.mark.parametrize("name", ["plain", "sharded", "zero2", "zero3"])
def test_a_checkpoint_of_two_processes_resumes_in_one(train, two_processes, tmp_path, name, capsys):
    needs_deepspeed(name)
    shutil.copytree(two_processes / name, tmp_path / "moved")
    (tmp_path / "moved" / "summary.json").unlink()
    whole = train("one", **ARMS[name], train__micro_batch_size=8)
    resumed = train("moved", **ARMS[name], train__micro_batch_size=8, train__resume=True)
    assert "resuming step-00000004" in capsys.readouterr().out
    assert resumed.losses() == pytest.approx(whole.losses(), rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "processes", "expected"),
    [((32, 128, 512), 8, 0), ((32, 128, 512), 64, 1), ((6, 3, 64), 4, 2), ((5, 7), 4, 0), ((8,), 2, 0)],
)
def test_sharded_dimension_divides_evenly(shape, processes, expected):
    assert shard_dim(torch.Size(shape), processes) == expected


def test_statistics_of_one_process_alone_would_show(train, monkeypatch):
    """The test above can fail: half a batch with its own statistics gives other losses."""
    from dsmoe.trainer.step import Stepper

    whole = train("one", **LARGE, train__micro_batch_size=8)
    monkeypatch.setattr(Stepper, "needs_gathering", lambda *_: False)
    halves = train("two", **LARGE, train__micro_batch_size=4)
    assert max(abs(a / b - 1) for a, b in zip(halves.losses(), whole.losses())) > 1e-4
