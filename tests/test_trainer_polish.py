"""Starting from a checkpoint, training with fixed policies, self-distillation, and `dsmoe polish`."""

import json
import shutil

import pytest
import torch
import yaml
from accelerate import Accelerator
from torch.nn import functional

from dsmoe import DSMoEForCausalLM, cli
from dsmoe.config.run import DistillationSettings, MaskPhaseSettings
from dsmoe.data.corpus import TokenCorpus
from dsmoe.errors import UserError
from dsmoe.model import use_routing
from dsmoe.trainer.distillation import Distiller, kl_divergence
from dsmoe.trainer.mask_phase import make_controller

MI = {"router_loss__router_mi_loss_coef_mlp": 1e-3}


@pytest.fixture
def dense_run(train):
    """A finished DS-MoE run of a few steps."""
    found = train("dense", **MI)
    assert found.status == 0
    return found


def sparsified(run, *words):
    """A sparse checkpoint of a run."""
    output = run.folder.parent / f"sparse{len(list(run.folder.parent.iterdir()))}"
    assert cli.main(["sparsify", str(run.folder), "--output", str(output), *words]) == 0
    return output


def test_kl_divergence_is_torchs_own():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 11, generator=generator) for _ in range(2))
    labels = torch.randint(11, (2, 5), generator=generator)
    labels[0, 3] = labels[1, 0] = -100
    kept = labels.flatten() != -100
    wanted = functional.kl_div(
        student.flatten(0, 1)[kept].log_softmax(-1),
        teacher.flatten(0, 1)[kept].log_softmax(-1),
        reduction="sum",
        log_target=True,
    )
    assert float(kl_divergence(student, teacher, labels)) == pytest.approx(float(wanted), rel=1e-5)
    assert float(kl_divergence(teacher, teacher, labels)) == pytest.approx(0.0, abs=1e-6)


def test_a_run_starts_from_the_weights_of_another(train, dense_run):
    still = train("still", train__init_from=dense_run.folder, optim__learning_rate=0.0, **MI)
    assert still.status == 0
    before, after = dense_run.weights(), still.weights()
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0)
    # its config.yaml tells the model that was trained
    assert (
        yaml.safe_load((still.folder / "config.yaml").read_text())["model"]
        == still.summary()["config"]["model"]
    )


def test_a_sparsified_model_trains_with_all_its_experts(train, dense_run, capsys):
    sparse = sparsified(dense_run, "--policy", "top_k", "--k", "1")
    capsys.readouterr()
    again = train("again", train__init_from=sparse, **MI)
    assert "was sparsified (mlp); training begins with all its experts" in capsys.readouterr().out
    whole = train("whole", train__init_from=dense_run.folder, **MI)
    assert again.log() == whole.log()


def test_text_of_another_tokenizer_is_refused(train, dense_run, corpus_dir, tmp_path, capsys):
    """As many entries, trained on other text."""
    file = tmp_path / "other.jsonl"
    texts = (f"{'xyzuvw'[i % 6] * 3} {'klmno'[i % 5] * 2} qq{i}" for i in range(400))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["--source", f"other={file}", "--validation-fraction", "0.1", "--output", str(tmp_path / "data")]
    assert cli.main(["data", "prepare", "--train-tokenizer", "300", *words]) == 0
    capsys.readouterr()
    refused = train("refused", train__init_from=dense_run.folder, data__path=tmp_path / "data", **MI)
    error = capsys.readouterr().err.strip()
    assert refused.status == 2 and not refused.folder.exists()
    assert "another tokenizer" in error and f"--tokenizer {dense_run.folder / 'final'}`" in error
    taught = {
        "distillation__coef": 0.5,
        "distillation__teacher": dense_run.folder,
        "mask_phase__fraction": 0.5,
    }
    assert train("taught", data__path=tmp_path / "data", **taught, **MI).status == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: distillation.teacher: ") and "another tokenizer" in error
    # a model that names none is taken at its word
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (dense_run.folder / "final" / name).unlink()
    assert train("taken", train__init_from=dense_run.folder, data__path=tmp_path / "data", **MI).status == 0
    assert "note: no tokenizer can be read in" in capsys.readouterr().out


def test_the_text_goes_on_where_another_run_ended(train):
    """With a learning rate of zero, losses are those of the text alone."""
    settings = {"optim__learning_rate": 0.0, "train__log_every_steps": 1}
    whole = train("whole", **settings).losses()
    later = train("later", data__first_sample=2 * batch_size(train), **settings).losses()
    assert later[: len(whole) - 2] == pytest.approx(whole[2:], rel=1e-6)


def batch_size(train):
    """Samples of a step of the tiny runs."""
    from conftest import TRAIN

    return TRAIN["train.global_batch_size"]


def test_distillation_pulls_the_sparse_mode_to_the_teacher(train, dense_run, corpus_dir):
    """With coef 1 and a frozen teacher the gradient is that of the KL alone: the divergence falls."""
    policies = sparsified(dense_run, "--policy", "top_k", "--k", "1")
    teacher = train("teacher", train__seeds=[1], train__total_tokens=4096)
    settings = {
        "train__init_from": dense_run.folder, "mask_phase__fraction": 1.0, "mask_phase__policies": [str(policies)],
        "distillation__coef": 1.0, "distillation__teacher": teacher.folder, "optim__learning_rate": 3e-3,
        "train__total_tokens": 4096,
    }  # fmt: skip
    polished = train("polished", **settings)
    assert polished.status == 0
    before, after = (divergence(teacher, run, policies, corpus_dir) for run in (dense_run, polished))
    assert after < 0.7 * before


def divergence(teacher, student, policies, corpus_dir):
    """Mean KL of a run's model under the policies from the teacher's all-experts mode, on text of the corpus."""
    from dsmoe.checkpoint.pretrained import load_pretrained
    from dsmoe.model import use_routing
    from dsmoe.sparsify.calibration import sample_corpus

    models = [load_pretrained(run.folder, torch.float32)[0] for run in (teacher, student)]
    routing = load_pretrained(policies, torch.float32)[0].config.mlp_routing
    batch = sample_corpus(TokenCorpus(corpus_dir), "train", 1024, 16, 64, 0).batches[0]
    tokens, labels = batch["input_ids"], batch["shift_labels"]
    with torch.no_grad(), use_routing(models[1], mlp=routing):
        return (
            float(kl_divergence(models[1](tokens).logits, models[0](tokens).logits, labels)) / tokens.numel()
        )


@pytest.mark.parametrize("kind", ["dsmoe", "smoe"])
def test_a_frozen_ds_moe_teaches_with_all_its_experts(train, dense_run, corpus_dir, kind):
    """Whatever policies it was sparsified with; an SMoE never ran with all of them and keeps its own."""
    folder = sparsified(dense_run, "--policy", "top_k", "--k", "1")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "kind": kind}))
    teacher = DSMoEForCausalLM.from_pretrained(folder).eval()
    tokens = torch.arange(24)[None] % teacher.config.vocab_size
    batch = {"input_ids": tokens}
    settings = DistillationSettings(coef=0.5, teacher=str(folder))
    found = Distiller(settings, Accelerator(cpu=True), teacher)._teacher_logits(None, batch)
    sparse = teacher(tokens).logits
    with use_routing(teacher, mlp={"policy": "dense"}):
        dense = teacher(tokens).logits
    assert not torch.allclose(sparse, dense)
    torch.testing.assert_close(found, dense if kind == "dsmoe" else sparse)


def test_a_frozen_teacher_runs_in_the_precision_of_the_run(dense_run):
    """Where accelerate has no autocast to give, as under ZeRO, too: all strategies have the same targets."""
    teacher = DSMoEForCausalLM.from_pretrained(dense_run.folder / "final").eval()
    batch = {"input_ids": torch.arange(24)[None] % teacher.config.vocab_size}
    settings = DistillationSettings(coef=0.5, teacher=str(dense_run.folder))
    exact, rounded = (
        Distiller(settings, Accelerator(cpu=True), teacher, precision)._teacher_logits(None, batch)
        for precision in ("f32", "bf16")
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = teacher(**batch, use_cache=False).logits
    assert torch.equal(rounded, expected) and not torch.equal(rounded.float(), exact)


def test_self_distillation_is_off_in_all_experts_mode(train):
    plain = train("plain", **MI)
    assert train("distilled", distillation__coef=0.5, **MI).log() == plain.log()


def test_policies_are_drawn_by_the_number_of_the_step(dense_run, tiny_config):
    first = sparsified(dense_run, "--policy", "top_k", "--k", "1")
    second = sparsified(dense_run, "--policy", "top_k", "--k", "2")
    from dsmoe.config import DSMoEConfig

    config = DSMoEConfig.from_pretrained(first)
    settings = MaskPhaseSettings(fraction=1.0, policies=[str(first), str(second)])
    ks = [
        [cycle.routing(step, 4)["mlp"][0]["k"] for step in range(40)]
        for cycle in (make_controller(settings, config, 8), make_controller(settings, config, 8))
    ]
    assert ks[0] == ks[1] and set(ks[0]) == {1, 2}
    with pytest.raises(UserError, match="num_hidden_layers"):
        make_controller(settings, tiny_config(num_hidden_layers=config.num_hidden_layers + 1), 8)
    with pytest.raises(UserError, match="no MLP experts"):
        make_controller(settings, tiny_config(kind="dense", num_experts=1, num_attention_experts=1), 8)
    for folder, message in {
        "nowhere": r"mask_phase\.policies: nowhere: no model folder \(config\.json is missing\); name folders of",
        str(broken(first, "[")): "not a JSON file",
        str(broken(first, json.dumps({"model_type": "dsmoe", "num_experts": "four"}))): r"config\.json: ",
    }.items():
        with pytest.raises(UserError, match=message):
            make_controller(MaskPhaseSettings(fraction=1.0, policies=[folder]), config, 8)
    # the folder of a run holds a config.json of its own, which says nothing of a model
    of_run = make_controller(MaskPhaseSettings(fraction=1.0, policies=[str(dense_run.folder)]), config, 8)
    assert of_run.policy(4) == DSMoEConfig.from_pretrained(dense_run.folder / "final").mlp_routing


def broken(folder, text):
    """A copy of a model folder with another config.json."""
    copy = folder.with_name(f"broken{len(list(folder.parent.iterdir()))}")
    shutil.copytree(folder, copy)
    (copy / "config.json").write_text(text)
    return copy


def test_polish_command(train, dense_run, capsys):
    policies = sparsified(dense_run, "--policy", "top_k", "--k", "1")
    output = dense_run.folder.parent / "polished"
    words = ["polish", str(dense_run.folder), "--policies", str(policies), "--output", str(output), "--tokens", "2k",
             "--measure-tokens", "500"]  # fmt: skip
    train("unrelated", train__total_tokens=64)  # leaves accelerate's state as a fresh process has it
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    assert cli.main(words) == 0
    sparse = output / policies.name
    report = json.loads((sparse / "sparsity.json").read_text())
    assert report["polished"]["tokens"] == 2000 and report["measured_loss"] > 0
    config = json.loads((sparse / "config.json").read_text())
    assert {policy["k"] for policy in config["mlp_routing"]} == {1}
    run = json.loads((output / "summary.json").read_text())["config"]
    dense = json.loads((dense_run.folder / "summary.json").read_text())["config"]
    assert run["optim"]["learning_rate"] == pytest.approx(
        dense["optim"]["learning_rate"] * dense["optim"]["min_lr_ratio"]
    )
    assert run["data"]["first_sample"] > 0 and run["model"]["num_experts"] == dense["model"]["num_experts"]
    assert cli.main([*words[:1], str(dense_run.folder.parent), *words[2:]]) == 2
    assert "summary.json" in capsys.readouterr().err


def test_what_polish_refuses_is_refused_before_training(dense_run, monkeypatch, capsys, corpus_dir):
    """None of these may train or leave anything behind."""
    monkeypatch.setattr("dsmoe.sparsify.polish.train", lambda words: pytest.fail("it trained"))
    home = dense_run.folder.parent
    good = sparsified(dense_run, "--policy", "top_k", "--k", "1")
    for name in ("final", "log.jsonl"):
        shutil.copytree(good, home / "more" / name)
    removed = sparsified(dense_run, "--policy", "threshold", "--threshold", "0.9", "--data", str(corpus_dir),
                         "--remove-unused", "0.2")  # fmt: skip
    config = json.loads((removed / "config.json").read_text())
    assert min(map(len, config["mlp_kept_experts"])) < 4
    (home / "held").mkdir()
    (home / "held" / good.name).mkdir()
    (home / "held" / good.name / "precious").touch()
    monkeypatch.chdir(home / "more" / "final")
    capsys.readouterr()
    output, before = str(home / "polished"), sorted(home.rglob("*"))
    for policies, words, message in [
        ([home / "more" / "final"], [], "polished/final, which the run itself uses"),
        (["."], [], "polished/final, which the run itself uses"),
        (["../log.jsonl"], [], "polished/log.jsonl, which the run itself uses"),
        ([good, f"{good}/../{good.name}"], [], f"two folders are called {good.name!r}"),
        ([good], ["--output", str(home)], f"{good}, which is read"),
        ([good], ["--output", str(dense_run.folder), "--overwrite"], "which is read"),
        ([good], ["--output", str(home / "held")], "is not empty"),
        ([removed], [], "experts were removed from it"),
        ([good], ["--measure-tokens", "-50000"], "--measure-tokens -50000: must be at least 1"),
        ([good], ["--measure-tokens", "0"], "--measure-tokens 0: must be at least 1"),
        ([good], ["--learning-rate", "0"], "--learning-rate 0: must be a number above 0"),
        ([good], ["--learning-rate", "nan"], "--learning-rate nan: must be a number above 0"),
        ([good], ["--data", str(home / "nowhere")], "not a prepared corpus"),
        ([good], ["--teacher", str(home / "nowhere")], "no model folder"),
    ]:  # fmt: skip
        chosen = [
            "polish",
            str(dense_run.folder),
            "--output",
            output,
            "--policies",
            *map(str, policies),
            *words,
        ]
        assert cli.main(chosen) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert sorted(home.rglob("*")) == before


def test_polish_of_a_run_with_a_shared_dense_stage(train, tmp_path, capsys):
    """Its settings name the stage, which polishing has none of."""
    phase = {"mask_phase__fraction": 0.5, "mask_phase__dense_stage": str(tmp_path / "stage")}
    run = train("staged", **phase, **MI)
    assert run.status == 0
    policies = sparsified(run, "--policy", "top_k", "--k", "1")
    words = ["polish", str(run.folder), "--policies", str(policies), "--output", str(tmp_path / "polished")]
    assert cli.main([*words, "--tokens", "256", "--learning-rate", "1e-3"]) == 0, capsys.readouterr().err


def test_polish_refuses_a_learning_rate_that_decayed_to_nothing(train, capsys):
    run = train("to-zero", optim__min_lr_ratio=0.0, **MI)
    policies = sparsified(run, "--policy", "top_k", "--k", "1")
    words = ["--policies", str(policies), "--output", str(run.folder.parent / "polished")]
    assert cli.main(["polish", str(run.folder), *words]) == 2
    assert "ended with a learning rate of 0; pass --learning-rate" in capsys.readouterr().err
    assert not (run.folder.parent / "polished").exists()
