"""Two processes are one: the same losses and weights, with and without accumulation."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsmoe.trainer.parallel import shard_dim

ROOT = Path(__file__).resolve().parents[1]
# starting processes takes most of the time, so one launch runs the script for every arm
DRIVER = """
import json, pathlib, runpy, sys
from accelerate import Accelerator
end_training = Accelerator.end_training
Accelerator.end_training = lambda self: None  # it takes the process group down
runs = json.loads(open(sys.argv[1]).read())
for number, arguments in enumerate(runs):
    if number == len(runs) - 1:
        Accelerator.end_training = end_training
    if "--train.resume" in arguments:  # a finished run is not resumed
        folder = arguments[arguments.index("--train.output_dir") + 1]
        pathlib.Path(folder, "summary.json").unlink(missing_ok=True)
    sys.argv = [sys.argv[0], *arguments]
    try:
        runpy.run_path({script!r}, run_name="__main__")
    except SystemExit as stopped:
        assert stopped.code == 0, stopped.code
"""
LARGE = {
    "router_loss__router_mi_loss_coef_mlp": 3.0,
    "train__total_tokens": 6 * 128,
    "train__save_every_steps": 4,
}
ARMS = {
    "plain": LARGE,
    "accumulated": LARGE,
    "sharded": {**LARGE, "train__sharding": "fsdp2"},
    "sharded-accumulated": {**LARGE, "train__sharding": "fsdp2"},
    "smoe": {
        **LARGE,
        "model__kind": "smoe",
        "model__mlp_routing": {"policy": "top_k", "k": 2},
        "router_loss__router_mi_loss_coef_mlp": 0.0,
        "router_loss__load_balancing_coef": 3.0,
        "data__isolate_documents": True,
    },
}
# sequences per forward and process, in one process and in two
MICRO = {
    "plain": (8, 4),
    "accumulated": (4, 2),
    "sharded": (8, 4),
    "sharded-accumulated": (4, 2),
    "smoe": (8, 2),
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, train_arguments):
    """Folder with the runs of two processes."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "driver.py").write_text(DRIVER.format(script=str(ROOT / "train" / "pretrain.py")))
    runs = [
        train_arguments(
            folder / name, **settings, train__micro_batch_size=MICRO[name][1], train__num_processes=2
        )
        for name, settings in ARMS.items()
    ]
    # two of them once more from their checkpoints: the logs must come out as if nothing had happened
    names = list(ARMS)
    runs += [[*runs[names.index(name)], "--train.resume", "true"] for name in ("plain", "sharded")]
    (folder / "arguments.json").write_text(json.dumps(runs))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE")}
    done = subprocess.run(
        [*launcher, str(folder / "driver.py"), str(folder / "arguments.json")],
        env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 process(es)") == len(runs)
    assert done.stdout.count("resuming step-00000004") == 2
    return folder


def read(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ARMS)
def test_two_processes_equal_one(train, two_processes, name):
    from safetensors.torch import load_file

    one = train("one", **ARMS[name], train__micro_batch_size=MICRO[name][0])
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
    weights = load_file(two_processes / name / "final" / "model.safetensors")
    for key, tensor in one.weights().items():
        assert (weights[key] - tensor).norm() <= 1e-3 * tensor.norm(), key
    assert (two_processes / name / "checkpoints" / "step-00000004" / "state.json").exists()


@pytest.mark.parametrize("name", ["plain", "sharded"])
def test_a_checkpoint_of_two_processes_resumes_in_one(train, two_processes, tmp_path, name, capsys):
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
    monkeypatch.setattr(Stepper, "_needs_gathering", lambda *_: False)
    halves = train("two", **LARGE, train__micro_batch_size=4)
    assert max(abs(a / b - 1) for a, b in zip(halves.losses(), whole.losses())) > 1e-4
