"""Every configuration file that is shipped loads strictly through the trainer's parser, and its model builds."""

import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from dsmoe import DSMoEForCausalLM, cli
from dsmoe.accounting import total_parameters
from dsmoe.data.command import recipe_from_args
from dsmoe.data.recipe import check_recipe
from dsmoe.study.spec import read_study
from dsmoe.trainer.command import parse
from dsmoe.trainer.launch import count_micro_batches

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MODELS = sorted((CONFIGS / "model").glob("*.yaml"))
RUNS = sorted(
    path for folder in ("quickstart", "recipe", "recipe_1b") for path in (CONFIGS / folder).glob("*.yaml")
)


@pytest.mark.parametrize("path", [*MODELS, *RUNS], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_it_loads_and_builds(path):
    # a config of a model is the section `model` of a run
    option = "--model" if path in MODELS else "--config"
    run, _, resolved = parse([option, str(path), "--data.path", "somewhere"])
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values = {"model": values} if path in MODELS else values
    found = yaml.safe_load(resolved)
    for section, settings in values.items():
        for name, value in settings.items() if isinstance(settings, dict) else ():
            assert found[section][name] == value, f"{section}.{name}"
    config = run.model_config()
    with torch.device("meta"):
        model = DSMoEForCausalLM(config)
    assert model.num_parameters() == total_parameters(config)


@pytest.mark.parametrize("path", [MODELS[0], *RUNS[:1]], ids=lambda path: path.parent.name)
def test_an_unknown_key_fails(path, tmp_path, capsys):
    option = "--model" if path in MODELS else "--config"
    changed = tmp_path / path.name
    changed.write_text(path.read_text(encoding="utf-8") + "\nhiden_size: 3\n", encoding="utf-8")
    with pytest.raises(SystemExit) as caught:
        parse([option, str(changed), "--data.path", "somewhere"])
    assert caught.value.code == 2
    assert "hiden_size" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_knows_its_configs(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= config.num_machines
    text = path.read_text(encoding="utf-8")
    launched = f"accelerate launch --config_file configs/accelerate/{path.name}" in text
    if config.distributed_type == "MULTI_CPU":  # which accelerate doesn't start without MPI
        launched = f"torchrun --standalone --nproc_per_node {config.num_processes}" in text
    assert launched
    if config.num_processes > 1:
        assert f"--train.num_processes {config.num_processes}" in text


def test_a_resolved_config_resolves_to_itself(tmp_path):
    policy = "[{policy: top_k, k: 2}, {policy: top_k, k: 3}]"
    options = ["--data.path", "somewhere", "--model.num_hidden_layers", "2", "--model.mlp_routing", policy]
    options += ["--model.kind", "smoe"]
    first, _, resolved = parse([*options, "--train.seeds", "[1,2]", "--data.weights", "{a: 1.0, b: 2}"])
    (tmp_path / "config.yaml").write_text(resolved, encoding="utf-8")
    second, _, again = parse(["--config", str(tmp_path / "config.yaml")])
    assert again == resolved
    assert second == first
    assert first.model_config().mlp_routing == [{"policy": "top_k", "k": 2}, {"policy": "top_k", "k": 3}]


def test_the_models_of_1b_are_twins_with_batches_for_their_processes(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    runs = {}
    for path in sorted((CONFIGS / "recipe_1b").glob("*.yaml")):
        text = path.read_text(encoding="utf-8").replace("\\\n#", "")
        line = next(line for line in text.splitlines() if "Command:" in line)
        words = shlex.split(line.split("train/pretrain.py")[1].replace("DATA", "somewhere"))
        run, _, _ = parse(words)
        run.check()
        assert count_micro_batches(run.train, run.train.num_processes) == 1
        runs[run.model.kind] = run
    totals = {kind: total_parameters(run.model_config()) for kind, run in runs.items()}
    assert set(totals) == {"dense", "dsmoe", "smoe"} and 0.99e9 < totals["dense"] < 1.02e9
    # but for the routers
    assert totals["dsmoe"] == totals["smoe"] < 1.002 * totals["dense"]
    for run in runs.values():
        assert run.optim == runs["dense"].optim and run.data == runs["dense"].data
        assert run.train.total_tokens == runs["dense"].train.total_tokens


def readme_command(start):
    """The words of the README's first command that starts so; its lines may end in a backslash."""
    text = (CONFIGS.parent / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    line = next(line for line in text.splitlines() if line.startswith(start))
    return shlex.split(line, comments=True)[len(start.split()) :]


def test_the_readme_prepares_a_corpus_and_trains_on_it(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    args = cli.build_parser("data").parse_args(["data", "prepare", *readme_command("dsmoe data prepare")])
    recipe = recipe_from_args(args)
    check_recipe(recipe)
    run, _, _ = parse(readme_command("accelerate launch train/pretrain.py"))
    assert run.data.path == str(args.output)
    # as the trainer has it: an embedding for every entry of the tokenizer
    assert run.model_config().vocab_size >= recipe.train_tokenizer


def test_the_torchrun_command_of_the_docs_has_batches_for_its_processes(monkeypatch):
    """Two processes can't share a batch of 8 in micro-batches of 8."""
    monkeypatch.chdir(CONFIGS.parent)
    text = (CONFIGS.parent / "train" / "README.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("torchrun --nproc_per_node "))
    words = shlex.split(line)
    run, _, _ = parse(words[words.index("train/pretrain.py") + 1 :])
    assert count_micro_batches(run.train, int(words[2])) == 1


@pytest.mark.parametrize("name,arm", [("dense", "dense"), ("dsmoe", "third"), ("smoe", "smoe-k11")])
def test_the_recipe_is_what_the_study_measured(name, arm):
    """The recipes name an arm of study shares, whose record holds their result."""
    study = read_study(CONFIGS / "quality" / "shares.yaml")
    run = next(run for run in study.runs if run.point == arm)
    settings = []
    for key, value in run.settings.items():
        settings += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    wanted = yaml.safe_load(parse(["--config", str(study.config), *settings])[2])
    recipe = CONFIGS / "recipe" / f"{name}.yaml"
    found = yaml.safe_load(parse(["--config", str(recipe), "--data.path", wanted["data"]["path"]])[2])
    wanted["name"] = name
    for key in ("compile", "attention"):  # what suits the study's machine
        del wanted["train"][key], found["train"][key]
    if name == "dense":  # which has neither routers nor gates
        for key in ("gate_normalization", "router_initializer_range"):
            del wanted["model"][key], found["model"][key]
    assert found == wanted
