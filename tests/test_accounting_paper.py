"""The nine models of the paper: every YAML loads, counts equal numel() and meet the paper within 1%."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml

from dsmoe.accounting import count_parameters, markdown_table
from dsmoe.accounting.paper import (
    PAPER_MODELS,
    compare_all,
    compare_with_paper,
    comparison_table,
    read_model_config,
    solve_mean_active_mlp_experts,
)
from dsmoe.errors import UserError
from dsmoe.model import DSMoEForCausalLM

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs" / "model"
BY_FILE = {model.file: model for model in PAPER_MODELS}


@pytest.fixture(scope="module")
def configs():
    return {file: read_model_config(FOLDER / f"{file}.yaml") for file in BY_FILE}


@pytest.mark.parametrize("file", BY_FILE)
def test_total_is_within_one_percent_of_the_paper(configs, file):
    comparison = compare_with_paper(BY_FILE[file], configs[file])
    assert abs(comparison.total_difference) < 0.01
    assert abs(comparison.active_difference) < 0.01
    assert comparison.fitted == file.startswith("dsmoe")


@pytest.mark.parametrize("file", BY_FILE)
def test_counts_equal_numel_of_the_model(configs, file):
    with torch.device("meta"):
        model = DSMoEForCausalLM(configs[file])
    counts = count_parameters(configs[file])
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight.numel() + model.lm_head.weight.numel()
    assert counts.non_embedding == counts.total - embedding


@pytest.mark.parametrize("file", BY_FILE)
def test_header_states_the_counts(configs, file):
    text = (FOLDER / f"{file}.yaml").read_text(encoding="utf-8")
    comparison = compare_with_paper(BY_FILE[file], configs[file])
    paper, ours, percent = re.search(r"paper (\d+)M, ours ([\d.]+)M \(([-+][\d.]+)%\)", text).groups()
    assert int(paper) * 10**6 == comparison.paper_total
    assert ours == f"{comparison.total / 1e6:.1f}"
    assert percent == f"{100 * comparison.total_difference:+.2f}"
    if not file.startswith("dense"):
        assert comparison.assumption.removeprefix("fitted: ") in text


def test_dense_twins_and_dsmoes_differ_by_their_routers_only(configs):
    for size in ("1b", "3b", "6b"):
        dense, dsmoe = count_parameters(configs[f"dense_{size}"]), count_parameters(configs[f"dsmoe_{size}"])
        assert dsmoe.non_embedding - dense.non_embedding == dsmoe.router


def test_the_solved_mean_meets_the_active_count(configs):
    config = configs["dsmoe_3b"]
    mean = solve_mean_active_mlp_experts(config, 934e6)
    counts = count_parameters(config, {"mlp": [mean] * config.num_hidden_layers})
    assert counts.active_non_embedding == pytest.approx(934e6, abs=1)
    without = solve_mean_active_mlp_experts(config, 934e6, count_router=False)
    counts = count_parameters(config, {"mlp": [without] * config.num_hidden_layers})
    assert counts.active_non_embedding - counts.router == pytest.approx(934e6, abs=1)


def test_a_missing_config_is_named(configs):
    with pytest.raises(UserError, match="no config for 'smoe_5b'"):
        compare_all({file: config for file, config in configs.items() if file != "smoe_5b"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hidden_size: 64\nhiden: 3", "'hiden' is not a field"),
        ("- 1", "must be a mapping"),
        ("a: [", "line 1: while parsing"),
        ("num_experts: many", "num_experts"),
        (None, "No such file"),
    ],
)
def test_bad_model_files_are_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "model.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_model_config(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_configs_hold_fields_of_the_config_only(configs):
    for file, config in configs.items():
        fields = yaml.safe_load((FOLDER / f"{file}.yaml").read_text(encoding="utf-8"))
        assert all(getattr(config, name) == value for name, value in fields.items() if name != "mlp_routing")


def run_script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["paper_models.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "eval" / "paper_models.py"), run_name="__main__")
    return ended.value.code


def test_script_prints_a_table_and_json(monkeypatch, capsys, tmp_path):
    names = [model.name for model in PAPER_MODELS]
    assert run_script(monkeypatch, "--json", "-") == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == names
    assert run_script(monkeypatch, "--json", tmp_path / "counts.json") == 0
    printed = capsys.readouterr().out
    assert all(f"| {name} " in printed for name in names)
    assert [row["name"] for row in json.loads((tmp_path / "counts.json").read_text())] == names
    assert run_script(monkeypatch, "--configs", tmp_path) == 2
    assert "dense_1b.yaml: No such file" in capsys.readouterr().err


def test_table_is_aligned(configs):
    lines = comparison_table(compare_all(configs)).splitlines()
    assert len(lines) == 2 + len(PAPER_MODELS)
    assert len({len(line) for line in lines}) == 1
    assert markdown_table(["a", "bb"], [["xyz", "1"]]) == "| a   | bb |\n|-----|---:|\n| xyz |  1 |"
