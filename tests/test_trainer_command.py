"""Bad input to `train/pretrain.py`: exit status 2 and one line that says what would be right."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dsmoe.config.run import RunConfig, TrainSettings
from dsmoe.errors import UserError
from dsmoe.trainer.command import main
from dsmoe.trainer.launch import count_micro_batches, start_trackers
from dsmoe.trainer.loop import TrainingRun

ROOT = Path(__file__).resolve().parents[1]


def refused(capsys, arguments):
    """The one line on stderr of a command line that is refused."""
    try:
        status = main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model.num_expert", "4"], "model.num_experts"),
        (["--modle.num_experts", "4"], "model.num_experts"),
        (["--train.micro_batchsize=4"], "train.micro_batch_size"),
        (["--compareto", "x"], "compare_to"),
    ],
)
def test_unknown_options_name_the_nearest(capsys, words, expected):
    line = refused(capsys, words)
    assert words[0].split("=")[0].lstrip("-") in line and f"nearest known name is '{expected}'" in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model:\n  num_expert: 4\n", "model.num_experts"),
        ("model: {num_experts: 4}\nrouter_losses:\n  x: 1\n", "router_loss"),
        ("train:\n  seed: [0]\n", "train.seeds"),
        ("optim: {schedule: linear}\n", "optim.schedule"),
        ("model:\n  hidden_size: wide\n", "model.hidden_size"),
        ("model: [4]\n", "model"),
        ("model: {num_experts: 4\n", "config"),
        ("- 4\n", "config"),
    ],
)
def test_bad_files(capsys, tmp_path, text, expected):
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    assert expected in refused(capsys, ["--config", str(tmp_path / "run.yaml")])


def test_a_section_named_twice(capsys, tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("model: {hidden_size: 16}\ndata: {path: x}\nmodel: {num_experts: 4}\n")
    line = refused(capsys, ["--config", str(path)])
    assert f"{path}: line 3: the key 'model' stands twice" in line


def test_missing_file(capsys):
    assert "nowhere.yaml" in refused(capsys, ["--config", "nowhere.yaml"])


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("data.path", "", "data.path is empty"),
        ("data.path", "nowhere", "nowhere: not a prepared corpus"),
        ("data.weights", {"tinny": 1.0}, "no source 'tinny'; the nearest is 'tiny'"),
        ("data.sequence_length", 1, "data.sequence_length is 1; it must be at least 2"),
        ("data.sequence_length", 4096, "above model.max_position_embeddings 2048"),
        ("data.validation_split", "test", "no split 'test'"),
        ("model.vocab_size", 200, "model.vocab_size 200 is below the 300 entries"),
        ("model.num_experts", 3, "model.intermediate_size 64 is not divisible by num_experts 3"),
        ("model.kind", "dens", "model.kind is 'dens'; it must be one of dense, smoe, dsmoe"),
        (
            "train.global_batch_size",
            6,
            "train.global_batch_size 6 is not a multiple of micro_batch_size 4 times 1 process(es); with "
            "train.micro_batch_size 3 it is",
        ),
        ("train.micro_batch_size", 0, "train.micro_batch_size is 0"),
        ("train.log_every_steps", 0, "train.log_every_steps is 0"),
        ("train.eval_tokens", 0, "train.eval_tokens is 0"),
        ("train.seeds", [], "train.seeds is empty"),
        ("train.num_processes", 2, "1 process(es) came up, but train.num_processes asks for 2"),
        ("train.eval_policy", {"policy": "topk", "k": 2}, "train.eval_policy: unknown policy 'topk'"),
        ("train.eval_policy", {"policy": "top_k", "k": 5}, "train.eval_policy: k is 5"),
        ("mask_phase.fraction", 1.5, "mask_phase.fraction 1.5"),
        ("mask_phase.target_active", 0.0, "target_active 0.0"),
        ("mask_phase.targets", [0.5], "mask_phase.targets is [0.5] and mask_phase.fraction 0"),
        ("mask_phase.policies", ["a"], "mask_phase.policies is ['a'] and mask_phase.fraction 0"),
        ("distillation.teacher", "a", "distillation.teacher is 'a' and distillation.coef 0"),
        ("compare_to", "nowhere", "nowhere: no finished run there"),
        (
            "train.seeds",
            [1, 0, 1],
            "train.seeds [1, 0, 1]: 1 must be from 0 to 2**32 - 1 and stand there once",
        ),
        ("train.seeds", [-1], "-1 must be from 0"),
        ("train.num_threads", -1, "train.num_threads is -1; it must be at least 0"),
        ("train.save_every_minutes", -1.0, "train.save_every_minutes is -1.0; it must be above 0"),
        ("train.eval_every_tokens", -7, "train.eval_every_tokens is -7"),
        ("data.validation_split", "train", "data.validation_split is 'train', which is trained on"),
        ("optim.learning_rate", -1.0, "optim.learning_rate is -1.0; it must be at least 0"),
        ("optim.learning_rate", ".nan", "optim.learning_rate is nan"),
        ("optim.beta1", 1.5, "optim.beta1 is 1.5; it must be from 0 to below 1"),
        ("optim.eps", -1.0, "optim.eps is -1.0"),
        ("optim.grad_clip", -1.0, "optim.grad_clip is -1.0; it must be at least 0"),
        ("optim.weight_decay", -0.1, "optim.weight_decay is -0.1"),
        ("optim.warmup_fraction", 3.0, "optim.warmup_fraction is 3.0; it must be a share from 0 to 1"),
        ("router_loss.mi_running_decay", 1.0, "router_loss.mi_running_decay is 1.0"),
        ("router_loss.mi_final_factor", -0.5, "router_loss.mi_final_factor is -0.5"),
        ("mask_phase.gain", -5.0, "mask_phase.gain is -5.0"),
        ("router_loss.router_mi_loss_coef_mlp", ".nan", "router_loss.router_mi_loss_coef_mlp is nan"),
        ("router_loss.router_mi_loss_coef_attention", -1.0, "router_mi_loss_coef_attention is -1.0"),
        (
            "router_loss.load_balancing_coef",
            -0.5,
            "router_loss.load_balancing_coef is -0.5; it must be at least 0",
        ),
        ("router_loss.router_z_loss_coef", ".inf", "router_loss.router_z_loss_coef is inf"),
        ("router_loss.mi_ramp_start", 5.0, "router_loss.mi_ramp_start is 5.0; it must be a share"),
        ("train.total_tokens", 100, "train.total_tokens 100 is below one step of 128 tokens"),
        ("train.trackers", ["clearml"], "train.trackers: the package of 'clearml' isn't installed"),
        ("model.head_dim", 0, "model.head_dim is 0"),
        ("model.initializer_range", -1.0, "model.initializer_range is -1.0"),
        ("model.rope_theta", 0.0, "model.rope_theta is 0.0"),
        ("model.rms_norm_eps", -1.0, "model.rms_norm_eps is -1.0"),
        ("model.mlp_routing", {"policy": "top_k", "k": 1}, "model.mlp_routing with model.kind 'dsmoe'"),
    ],
)
def test_impossible_values(train, capsys, setting, value, expected):
    capsys.readouterr()
    run = train("run", **{setting: value})
    assert run.status == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert expected in lines[0]
    assert not (run.folder / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mask_phase__fraction": 0.5}, "mask_phase.fraction is 0.5, and the model has no MLP experts"),
        (
            {"router_loss__mi_control": "model", "router_loss__router_mi_loss_coef_mlp": 1e-3},
            "router_loss.mi_control is 'model', and the model has no MLP experts",
        ),
    ],
)
def test_what_needs_mlp_experts_is_refused_without_them(train, capsys, settings, words):
    heads = {"model__num_experts": 1, "model__num_attention_experts": 2, "model__qk_norm": "per_head"}
    assert train("run", **heads, **settings).status == 2
    assert words in capsys.readouterr().err


def test_a_micro_batch_that_works_is_named():
    train = TrainSettings(global_batch_size=16, micro_batch_size=16)
    assert count_micro_batches(train, 1) == 1
    with pytest.raises(UserError, match=r"16 times 2 process\(es\); with train.micro_batch_size 8 it is"):
        count_micro_batches(train, 2)
    with pytest.raises(UserError, match=r"3 process\(es\); raise it to a multiple of 3"):
        count_micro_batches(train, 3)


def test_a_target_below_one_expert(train, capsys):
    assert train("run", mask_phase__fraction=0.5, mask_phase__target_active=0.2).status == 2
    assert "mask_phase.target_active is 0.2, below 1 / num_experts = 0.25" in capsys.readouterr().err


def test_an_smoe_has_no_mask_phase(train, capsys):
    policy = {"policy": "top_k", "k": 2}
    run = train("run", model__kind="smoe", model__mlp_routing=policy, mask_phase__fraction=0.5)
    assert run.status == 2
    assert "mask_phase.fraction is 0.5 with model.kind 'smoe'" in capsys.readouterr().err


def test_a_dense_model_has_no_mask_phase(train, capsys):
    run = train("run", model__kind="dense", model__num_experts=1, mask_phase__fraction=0.2)
    assert run.status == 2
    assert "model.kind 'dense', which has no experts to leave out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("train.total_tokens", "1e6", "Expected an integer, such as 1000000. Got value: 1000000.0"),
        ("optim.learning_rate", "nan", "Expected a number (.nan and .inf are none). Got value: nan"),
        ("train.resume", "perhaps", "Expected true or false"),
    ],
)
def test_types_are_named_in_words(train, capsys, setting, value, words):
    with pytest.raises(SystemExit) as caught:
        train("run", **{setting: value})
    assert caught.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"optim__schedule": "wsd", "optim__warmup_fraction": 0.9, "optim__decay_fraction": 0.9},
            "optim.warmup_fraction 0.9 and decay_fraction 0.9 sum to more than 1",
        ),
        (
            {
                "router_loss__mi_schedule": "ramp",
                "router_loss__mi_ramp_start": 0.8,
                "router_loss__mi_ramp_end": 0.2,
            },
            "router_loss.mi_ramp_start is 0.8 and mi_ramp_end 0.2",
        ),
    ],
)
def test_values_that_contradict_each_other(train, capsys, settings, words):
    run = train("run", **settings)
    assert run.status == 2 and words in capsys.readouterr().err
    assert not run.folder.exists()


def test_a_refused_run_leaves_no_folder(train, capsys):
    run = train("run", data__weights={"tinny": 1.0})
    assert run.status == 2 and not run.folder.exists()


def test_an_output_folder_that_cannot_be(train, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        assert train("run", train__output_dir=str(path)).status == 2
        assert f"error: {path}: can't be made a folder (" in capsys.readouterr().err


def test_a_refused_run_changes_nothing(train, capsys):
    first = train("run", train__save_every_steps=4)
    config = (first.folder / "config.yaml").read_text()
    (first.folder / "summary.json").unlink()
    assert train("run", train__resume=True, model__hidden_size=16).status == 2
    assert (first.folder / "config.yaml").read_text() == config


def test_overwriting_leaves_nothing_of_the_old_model(train, monkeypatch):
    first = train("run")
    assert (first.folder / "final").exists()

    def fail(*_):
        raise UserError("stopped")

    monkeypatch.setattr("dsmoe.trainer.step.Stepper.step", fail)
    assert train("run", train__overwrite=True).status == 2
    assert not (first.folder / "final").exists() and not (first.folder / "summary.json").exists()


def test_a_launcher_that_asks_for_the_cpu_gets_it(train, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("dsmoe.trainer.state.torch.cuda.get_rng_state", lambda: torch.get_rng_state())
    run = train("run", train__total_tokens=128)
    assert run.status == 0
    monkeypatch.undo()
    assert run.summary()["environment"]["kernel"] == "cpp"


def test_world_size_without_a_launcher(train, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train("run").status == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    monkeypatch.undo()


def test_checks_cover_new_settings():
    """A policy without its optional field is filled in, as the loop reads it."""
    config = RunConfig()
    config.data.path = "somewhere"
    config.train.eval_policy = {"policy": "threshold_top_k", "threshold": 0.5}
    config.check()
    assert config.train.eval_policy == {"policy": "threshold_top_k", "threshold": 0.5, "k": None}


def test_print_only_trains_nothing(tmp_path, capsys):
    arguments = [
        "--data.path",
        "somewhere",
        "--train.output_dir",
        str(tmp_path / "run"),
        "--print_only",
        "true",
    ]
    assert main(arguments) == 0
    assert "router_mi_loss_coef_mlp: 0.0" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_the_script_itself(tmp_path):
    """The entry point in a process of its own: one line, no traceback; and launchers that bring up too few."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(ROOT / "train" / "pretrain.py"), "--train.num_step", "4"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) == 1
    assert "train.num_step" in done.stderr and "Traceback" not in done.stderr


def test_accelerate_launch_with_too_few_processes(monkeypatch):
    """On CPU `accelerate launch --num_processes 2` starts one process: its command line gives it away."""
    from dsmoe.errors import UserError
    from dsmoe.trainer import launch

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for command, asked in (
        (["python", "/bin/accelerate", "launch", "--cpu", "--num_processes", "2", "train/pretrain.py"], 2),
        (["python", "-m", "accelerate.commands.launch", "--num_processes=4", "train/pretrain.py"], 4),
        (["python", "/bin/accelerate", "launch", "train/pretrain.py"], None),
        (["bash", "--num_processes", "3"], None),
    ):
        monkeypatch.setattr(Path, "read_bytes", lambda _, words=command: "\0".join(words).encode())
        assert launch._asked_of_launcher() == asked
        if asked is not None:
            with pytest.raises(UserError, match=f"`accelerate launch --num_processes` asks for {asked}"):
                launch.check_processes(1, None)
            launch.check_processes(asked, asked)
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"bash")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE asks for 2"):
        launch.check_processes(1, None)


def test_runs_in_wandb_share_a_project_and_go_on_under_their_id(tmp_path, monkeypatch):
    calls = []
    accelerator = SimpleNamespace(
        trackers=[], init_trackers=lambda project, **more: calls.append((project, more))
    )
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    config = RunConfig(name="arm", train=TrainSettings(trackers=["wandb"], output_dir=str(tmp_path)))
    for seed in (0, 0, 1):
        start_trackers(config, seed, accelerator)
    config.train.seeds = [0, 1]
    start_trackers(config, 1, accelerator)
    assert {project for project, _ in calls} == {"dsmoe"}
    runs = [more["init_kwargs"]["wandb"] for _, more in calls]
    assert runs[0] == runs[1] and runs[0]["id"] != runs[2]["id"] and runs[0]["resume"] == "allow"
    assert [run["name"] for run in runs] == ["arm", "arm", "arm", "arm-seed-1"]
    assert calls[0][1]["config"]["optim"]["learning_rate"] == config.optim.learning_rate
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    start_trackers(config, 1, accelerator)
    assert calls[-1][0] == "mine"


def test_trackers(train):
    """Scalars go to accelerate's trackers under flat names."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train("run", train__trackers=["tensorboard"], train__total_tokens=2 * 128)
    assert run.status == 0
    events = EventAccumulator(str(next(run.folder.rglob("events*")).parent)).Reload()
    assert "router/mlp/entropy/1" in events.Tags()["scalars"]
    assert len(events.Scalars("lm_loss")) == 2
    assert json.dumps(run.losses()[0])[:5] == json.dumps(events.Scalars("lm_loss")[0].value)[:5]
    # seeds don't overlay each other
    several = train(
        "several", train__trackers=["tensorboard"], train__total_tokens=2 * 128, train__seeds=[0, 1]
    )
    assert several.status == 0
    folders = {path.parent for path in several.folder.rglob("events*")}
    steps = {}
    for folder in folders:
        found = EventAccumulator(str(folder)).Reload()
        if "lm_loss" in found.Tags()["scalars"]:
            steps[folder] = [event.step for event in found.Scalars("lm_loss")]
    assert list(steps.values()) == [[1, 2], [1, 2]], steps


def test_a_dense_twin_may_keep_the_policy_of_its_moe():
    """Sparse validation is a DS-MoE's; a recipe that both read names k among the experts of one."""
    config = RunConfig()
    config.data.path, config.train.eval_policy = "text", {"policy": "top_k", "k": 4}
    config.model.kind, config.model.num_experts = "dense", 1
    config.check()
    config.model.kind, config.model.num_experts = "dsmoe", 2
    with pytest.raises(UserError, match="k is 4"):
        config.check()


@pytest.mark.parametrize("name", ["checkpoints", "final", "log.jsonl"])
def test_a_folder_of_somebody_else_is_not_cleared(train, tmp_path, capsys, name):
    theirs = tmp_path / "run" / name
    theirs.parent.mkdir()
    theirs.write_text("theirs") if "." in name else theirs.mkdir()
    for options in ({}, {"train__resume": True}):
        assert train("run", **options).status == 2
        assert f"holds {name!r}, which a run would replace, and no run" in capsys.readouterr().err
        assert theirs.exists() and not (tmp_path / "run" / "environment.json").exists()
    assert train("run", train__overwrite=True).status == 0


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(train, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "run", interrupted)
        assert train("run").status == 130
    assert train("run", train__resume=True).status == 0


def test_a_run_does_not_replace_what_it_reads(train, tmp_path, capsys):
    """Neither a model folder nor the run whose model is trained on: resuming would find neither."""
    first = train("first")
    model = tmp_path / "model"
    shutil.copytree(first.folder / "final", model)
    before = sorted(model.iterdir()), (model / "config.json").read_bytes(), first.log()
    for output, given in (
        ("model", {"train__init_from": str(model)}),
        ("first", {"train__init_from": str(first.folder), "train__overwrite": True}),
        ("first", {"train__init_from": str(first.folder / "final"), "train__overwrite": True}),
        ("model", {"distillation__teacher": str(model), "distillation__coef": 0.5}),
    ):
        capsys.readouterr()
        assert train(output, **given).status == 2
        assert "stands there, which is read; name another folder" in capsys.readouterr().err
    assert before == (sorted(model.iterdir()), (model / "config.json").read_bytes(), first.log())
    assert train("second", train__init_from=str(first.folder)).status == 0


def test_a_comparison_goes_with_its_run(train):
    train("a")
    run = train("b", "--compare_to", str(train("a", train__resume=True).folder), optim__learning_rate=0.001)
    assert (run.folder / "comparison.json").exists()
    assert train("b", optim__learning_rate=0.001, train__overwrite=True).status == 0
    assert not (run.folder / "comparison.json").exists()
