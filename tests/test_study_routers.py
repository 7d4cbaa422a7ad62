"""The course of a study's routers: which runs are followed, and what balance and choice are."""

import json
import math

import pytest

from dsmoe.study.plot import routers_plot
from dsmoe.study.routers import router_courses, shortened


def run(name, group, num_experts, **model):
    return {"name": name, "group": group, "labels": {}, "model": {"num_experts": num_experts, **model}}


def line(name, tokens, **router):
    return json.dumps({"run": name, "tokens": tokens, "router": router})


RUNS = [
    run("ours-s0", "ours", 4, num_attention_experts=2),
    run("ours-s1", "ours", 4),
    run("dense-s0", "dense", 1),
    run("even-s0", "even", 8),
]


def test_balance_and_choice_of_the_first_seed(tmp_path):
    log4 = math.log(4)
    lines = [
        line("ours-s0", 100, mlp={"entropy": [log4, log4 / 2], "conditional_entropy": [log4, 0.0]},
             attention={"entropy": [math.log(2)], "conditional_entropy": [0.0]}),
        line("ours-s1", 100, mlp={"entropy": [0.0], "conditional_entropy": [0.0]}),
        json.dumps({"run": "ours-s0", "tokens": 150, "validation_loss": 3.0}),
        line("ours-s0", 200, mlp={"entropy": [log4, 0.0], "conditional_entropy": [0.0, 0.0]}),
        # as older records have it: without statistics, and without the second number
        json.dumps({"run": "even-s0", "tokens": 100, "lm_loss": 3.0}),
        line("even-s0", 200, mlp={"entropy": [1.0]}),
        # a dense twin has no choice, whatever its log says
        line("dense-s0", 100, mlp={"entropy": [0.0], "conditional_entropy": [0.0]}),
    ]  # fmt: skip
    found = router_courses(lines, RUNS)
    assert list(found) == ["mlp", "attention"] and list(found["mlp"]) == ["ours-s0"]
    assert found["mlp"]["ours-s0"] == [
        (100, pytest.approx(0.75), pytest.approx(0.5)),
        (200, pytest.approx(0.5), 0.0),
    ]
    assert found["attention"]["ours-s0"] == [(100, 1.0, 0.0)]
    routers_plot(found, tmp_path / "routers.png")
    assert (tmp_path / "routers.png").read_bytes().startswith(b"\x89PNG")


def test_a_log_line_is_shortened_to_what_is_drawn():
    long = {"entropy": [1.23456], "conditional_entropy": [0.5], "load": [[0.1] * 32], "z_loss": [7.0]}
    assert shortened({"step": 1, "router": {"mlp": long}}) == {
        "step": 1,
        "router": {"mlp": {"entropy": [1.2346], "conditional_entropy": [0.5]}},
    }
    assert shortened({"step": 1, "validation_loss": 2.0}) == {"step": 1, "validation_loss": 2.0}
    assert router_courses([], RUNS) == {}
