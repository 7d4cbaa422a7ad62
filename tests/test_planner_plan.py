"""The plan: its rows, ties, marks and intervals; laws read from files, with and without bootstrap draws."""

import dataclasses
import json

import pytest

from dsmoe.errors import UserError
from dsmoe.planner import Family, Limits, candidate_families, make_plan
from dsmoe.planner.lawfile import published, read_law
from dsmoe.planner.laws import PUBLISHED_JOINT, PUBLISHED_TABULATED, JointLaw
from dsmoe.planner.memory import Serving
from dsmoe.planner.recipe import batch_tokens, learning_rate
from dsmoe.planner.table import human_table

ISSUE_NAMES = (
    "kind", "num_experts", "hidden_size", "num_layers", "num_params_active", "num_params_total", "tokens", "loss",
    "loss_gap", "tie", "extrapolated", "assumed", "memory_bytes", "binding",
)  # fmt: skip
RANGE = {"num_params_active": [1e6, 1e9], "tokens_per_param": [1, 1000], "num_experts": [1, 8]}


@pytest.fixture
def law_file(tmp_path):
    """Writes a file as `dsmoe fit` does: law_file("joint", eta=0.8, draws=[{...}])."""

    def make(form="joint", draws=(), **changes):
        values = {**dataclasses.asdict(PUBLISHED_JOINT), **changes}
        content = {
            "law": form,
            "coefficients": {
                name: {"value": value, "interval": [value, value], "identified": name != "e_max"}
                for name, value in values.items()
                if value is not None
            },
            "bootstrap": list(draws),
            "range": RANGE,
            "rmse_train": 0.01,
            "rmse_held_out": 0.02,
        }
        path = tmp_path / "law.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        return path

    return make


def plan_with(law, experts=None, **limits):
    return make_plan(candidate_families(law, experts), Limits(**limits), law)


def test_rows_hold_the_names_that_other_tools_rely_on():
    plan = plan_with(
        published(), flops=1e22, memory_bytes=24e9, serving=Serving(16_384, 8), inference_tokens=1e11
    )
    content = json.loads(json.dumps(plan.as_dict()))
    assert {row["kind"] for row in content["rows"]} == {"dense", "smoe", "dsmoe"}
    assert content["rows"] == sorted(content["rows"], key=lambda row: row["loss"])
    for row in content["rows"]:
        assert set(ISSUE_NAMES) <= set(row)
        family = Family(row["kind"], row["num_experts"], row["mean_k"] / row["num_experts"])
        assert row["hidden_size"] % 64 == 0
        assert row["num_layers"] == row["num_heads"] == row["hidden_size"] // 64
        assert row["num_params_total"] == round(family.num_params_total(row["hidden_size"]))
        assert row["memory_bytes"] == sum(row["memory"].values()) <= 24e9
        assert row["memory"]["weights"] == pytest.approx(2 * row["num_params_total"])
        assert row["training_memory_bytes"] == pytest.approx(16 * row["num_params_total"])
        assert row["training_flops"] + row["inference_flops"] == pytest.approx(1e22)
        assert row["loss_gap"] == row["loss"] - content["rows"][0]["loss"]
        assert row["tie"] == (row["loss_gap"] <= 0.006)
        assert row["assumed"] == (row["kind"] == "dsmoe")
        low, high = row["loss_interval"]
        assert (row["loss"] - low, high - row["loss"]) == (pytest.approx(1.64 * 0.0062),) * 2
        assert row["continuous"]["loss"] <= row["loss"]
        if row["kind"] == "dsmoe":
            assert row["moe_intermediate_size"] * row["num_experts"] == 3 * row["hidden_size"]
            assert row["mean_k"] == pytest.approx(0.33 * 32)


def test_extrapolation_is_marked_by_what_is_out_of_range():
    plan = plan_with(published(), experts=[8, 64], flops=1e19, total_params=1e9)
    rows = {(row.family.kind, row.family.num_experts): row.fields for row in plan.rows}
    assert not rows["dense", 1]["extrapolated"]
    assert not rows["smoe", 8]["extrapolated"]
    assert "num_experts 64 outside 1 to 32" in rows["smoe", 64]["extrapolated_in"]
    large = plan_with(published(), flops=1e22).rows
    assert all(row.fields["extrapolated"] for row in large)
    assert "extrapolated" in human_table(plan)


def test_learning_rate_and_batch():
    family = Family("smoe", 8)
    # 13 L d^2 active parameters of a 1024 x 16 model
    assert learning_rate(family, 1024) == pytest.approx(
        4402.8 * (13 * 16 * 1024**2) ** -0.81 * 8**-0.25, rel=1e-3
    )
    assert learning_rate(Family("dsmoe", 32, 0.3), 1024) == learning_rate(Family("dense"), 1024)
    assert [batch_tokens(tokens) for tokens in (1e8, 2.6e9, 1e13)] == [2**16, 2**17, 2**18]


def test_impossible_candidates_are_listed_with_the_reason():
    plan = plan_with(published(), memory_bytes=14.5e6, max_tokens=1e9)
    # 64 x 1 with 32 experts takes 15.3 MB, with 16 experts 14.1 MB
    assert [(entry["kind"], entry["num_experts"]) for entry in plan.impossible] == [("smoe", 32)]
    assert all("memory" in entry["reason"] for entry in plan.impossible)
    assert "not possible: memory" in human_table(plan)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({}, "no limit"),
        ({"memory_bytes": 24e9}, "bounds the training tokens"),
        ({"max_tokens": 1e12}, "bounds the size"),
        ({"max_tokens_per_param": 20}, "bounds the size"),
        ({"flops": 1.0}, "flops allows"),
        ({"flops": 1e18, "inference_tokens": 1e15}, "flops allows"),
        ({"memory_bytes": 1e6, "max_tokens": 1e9}, "memory allows"),
        ({"total_params": 1e12, "memory_bytes": 1e9, "max_tokens": 1e9}, "1e[+]12 total parameters"),
    ],
)
def test_impossible_limits(limits, words):
    with pytest.raises(UserError, match=words):
        plan_with(published(), **limits)


def test_total_parameters_give_the_shapes_of_the_source():
    plan = plan_with(published(), experts=[2, 4], flops=1e21, total_params=1.1e9)
    sizes = {
        row.family.num_experts: row.fields["hidden_size"] for row in plan.rows if row.family.kind != "dsmoe"
    }
    assert sizes == {1: 1664, 2: 1408, 4: 1152}
    for row in plan.rows:
        assert row.fields["continuous"]["num_params_total"] == pytest.approx(1.1e9)


def test_a_law_file_equals_the_law_in_it(law_file):
    law = read_law(law_file())
    ours, fitted = plan_with(published(), flops=1e19), plan_with(law, flops=1e19)
    assert [row.real for row in fitted.rows] == [row.real for row in ours.rows]
    assert fitted.as_dict()["law"]["range"] == RANGE
    assert all(row.fields["assumed"] == (row.family.kind == "dsmoe") for row in fitted.rows)
    assert law.tie_band == 0.01  # a fit that is worse than the published one has a wider band


def test_a_fitted_eta_is_not_assumed_and_counts(law_file):
    law = read_law(law_file("joint_dsmoe", eta=0.8))
    row = next(row for row in plan_with(law, flops=1e19).rows if row.family.kind == "dsmoe")
    assert not row.fields["assumed"]
    expected = PUBLISHED_JOINT.loss(0.8 * row.fields["num_params_total"], row.fields["tokens"], 1)
    assert row.fields["loss"] == pytest.approx(expected, rel=1e-9)
    assert next(r for r in plan_with(law.with_eta(0.8), flops=1e19).rows if r.family.kind == "dsmoe").fields[
        "assumed"
    ]


def test_a_fitted_kappa_depends_on_the_experts(law_file):
    law = read_law(law_file("joint_dsmoe", kappa=0.1))
    assert law.fit.eta(Family("dsmoe", 32, 0.3)) == pytest.approx(32**-0.1)
    row = next(row for row in plan_with(law, flops=1e19).rows if row.family.kind == "dsmoe")
    expected = PUBLISHED_JOINT.loss(32**-0.1 * row.fields["num_params_total"], row.fields["tokens"], 1)
    assert row.fields["loss"] == pytest.approx(expected, rel=1e-9)
    assert "N ** -0.1" in human_table(plan_with(law, flops=1e19))


@pytest.mark.parametrize("reduced", [True, False])
def test_a_chinchilla_law_has_no_smoe_rows(law_file, reduced):
    values = {"delta": 0.0, "gamma": 0.0, "omega": 0.0, "zeta": 0.0}
    if reduced:
        values = dict.fromkeys((*values, "e_start", "e_max"), None)
    law = read_law(law_file("chinchilla", **values))
    plan = plan_with(law, flops=1e19)
    assert {row.family.kind for row in plan.rows} == {"dense", "dsmoe"}
    row = plan.rows[0].fields
    assert row["loss"] == pytest.approx(JointLaw(delta=0, gamma=0, omega=0, zeta=0).loss(
        row["num_params_total"], row["tokens"], 1), rel=1e-9)  # fmt: skip
    with pytest.raises(UserError, match="no entry for 8 experts"):
        candidate_families(law, [8])


def test_the_tabulated_law():
    plan = plan_with(published(tabulated=True), flops=1e21)
    for row in plan.rows:
        if row.family.kind == "smoe":
            reduced = PUBLISHED_TABULATED.at(row.family.num_experts)
            assert row.real.loss == reduced.loss(
                row.family.num_params_active(row.real.hidden_size), row.real.tokens
            )
    with pytest.raises(UserError, match="no entry for 3"):
        candidate_families(published(tabulated=True), [3])


def test_bootstrap_draws_give_intervals_and_the_stability_of_the_decision(law_file):
    # a fifth of the draws finds that experts cost tokens and bring nothing
    draws = [{"a": 35.91 + 0.1 * (index % 5 - 2)} for index in range(16)]
    draws += [{"delta": 0.0, "omega": 0.5, "gamma": 0.0, "zeta": 0.0}] * 4
    law = read_law(law_file(draws=draws, rmse_train=0.001))
    plan = plan_with(law, experts=[8], flops=1e20)
    best, others = plan.rows[0], plan.rows[1:]
    assert best.family == Family("smoe", 8)
    assert best.fields["best_share"] == pytest.approx(0.8)
    assert sum(row.fields["best_share"] for row in plan.rows) == pytest.approx(1)
    assert all(row.fields["best_or_tied_share"] >= row.fields["best_share"] for row in plan.rows)
    assert others[0].fields["best_or_tied_share"] == pytest.approx(0.2)
    low, high = others[0].fields["loss_interval"]
    assert low < high
    assert "best or tied" in human_table(plan)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "law is None"),
        ("[]", "law is 'list'"),
        ('{"law": "joint"}', "coefficients is missing"),
        ('{"law": "joint", "coefficients": {"a": {"value": 1}}}', "alpha is None"),
        ("nonsense", "not a JSON file"),
    ],
)
def test_bad_law_files(tmp_path, text, words):
    path = tmp_path / "law.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words) as caught:
        read_law(path)
    assert str(path) in str(caught.value)


def test_a_law_without_a_slope_is_refused(law_file):
    with pytest.raises(UserError, match="does not fall"):
        read_law(law_file(beta=0.0, zeta=0.0))
    with pytest.raises(UserError, match="no such file"):
        read_law("missing.json")
