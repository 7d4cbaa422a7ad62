"""The plan: its rows, ties, marks and intervals; laws read from files, with and without bootstrap draws."""

import dataclasses
import json
from pathlib import Path

import pytest

from dsmoe.errors import UserError
from dsmoe.planner import Family, Limits, candidate_families, make_plan
from dsmoe.planner.lawfile import published, read_law
from dsmoe.planner.laws import PUBLISHED_JOINT, PUBLISHED_TABULATED, JointLaw
from dsmoe.planner.memory import Serving
from dsmoe.planner.recipe import batch_tokens, learning_rate, recipe_notes
from dsmoe.planner.stability import MOST_DRAWS
from dsmoe.planner.table import human_table

ROOT = Path(__file__).resolve().parents[1]

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
        stored = family.num_params_stored(row["hidden_size"])
        assert stored == pytest.approx(row["num_params_total"], rel=0.01)
        assert row["memory"]["weights"] == 2 * stored
        assert row["training_memory_bytes"] == 16 * stored
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


def test_experts_of_a_ds_moe_have_a_range_of_their_own(law_file):
    """The law of DS-MoEs was fitted at 16 experts; that of SMoEs from 1 to 8."""
    path = law_file("joint_dsmoe", eta=0.8)
    content = json.loads(path.read_text(encoding="utf-8"))
    content["range"]["dsmoe_num_experts"] = [16, 16]
    path.write_text(json.dumps(content), encoding="utf-8")
    law = read_law(path)
    found = {count: law.beyond_range(Family("dsmoe", count, 0.33), 512, 1e9) for count in (8, 16, 32)}
    assert found == {
        8: ["dsmoe_num_experts 8 outside 16 to 16"],
        16: [],
        32: ["dsmoe_num_experts 32 outside 16 to 16"],
    }
    assert law.beyond_range(Family("smoe", 8), 512, 1e9) == []
    # no runs stand behind an eta that the user sets: the row is marked as assumed
    assert law.with_eta(0.9).beyond_range(Family("dsmoe", 32, 0.33), 512, 1e9) == []
    # the share that runs has a range too, where the law's runs told it
    content["range"]["dsmoe_active_share"] = [0.32, 0.36]
    path.write_text(json.dumps(content), encoding="utf-8")
    law = read_law(path)
    shares = {share: law.beyond_range(Family("dsmoe", 16, share), 512, 1e9) for share in (0.07, 0.3, 0.33)}
    assert shares == {0.07: ["dsmoe_active_share 0.07 outside 0.32 to 0.36"], 0.3: [], 0.33: []}
    unknown = read_law(law_file("joint_dsmoe", eta=0.8)).beyond_range(Family("dsmoe", 16, 0.33), 512, 1e9)
    assert unknown == ["dsmoe_num_experts: the law file does not say its range"]


def test_learning_rate_and_batch():
    family = Family("smoe", 8)
    # 13 L d^2 active parameters of a 1024 x 16 model
    assert learning_rate(family, 1024) == pytest.approx(
        4402.8 * (13 * 16 * 1024**2) ** -0.81 * 8**-0.25, rel=1e-3
    )
    assert learning_rate(Family("dsmoe", 32, 0.3), 1024) == learning_rate(Family("dense"), 1024)
    assert [batch_tokens(tokens) for tokens in (1e8, 2.6e9, 1e13)] == [2**16, 2**17, 2**18]
    assert recipe_notes(family, 1024, 1e8) == []


def test_the_recipe_stays_within_the_runs_of_its_rules():
    """The rule alone gives 0.65 at d = 64, and 64K tokens a batch are four steps of a quarter million tokens."""
    dense = Family("dense")
    ends = [4402.8 * size**-0.81 for size in (1e7, 2.7e9)]
    assert learning_rate(dense, 64) == pytest.approx(ends[0], rel=1e-3) == pytest.approx(0.0094, abs=1e-4)
    assert learning_rate(dense, 8192) == pytest.approx(ends[1], rel=1e-3)
    assert learning_rate(Family("smoe", 64), 1024) == learning_rate(Family("smoe", 32), 1024)
    for family, size in ((dense, 64), (dense, 8192), (Family("smoe", 64), 1024)):
        assert "learning rate clamped" in recipe_notes(family, size, 1e9)[0]
    for tokens in (2.5e5, 1e6, 6e6, 1e7, 1e8):
        assert tokens / batch_tokens(tokens) >= 100
        assert any("batch reduced" in note for note in recipe_notes(dense, 1024, tokens)) == (tokens < 6.5e6)
    assert batch_tokens(1e4) == 2048  # one sequence
    assert any("fewer than 100 steps" in note for note in recipe_notes(dense, 1024, 1e4))


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


def test_the_stability_speaks_of_shapes_that_can_be_built():
    """A law of tiny models puts the optimum below d = 64: all rows are d = 64, and there the draws compare them too."""
    law = read_law(ROOT / "eval" / "records" / "scaling-law" / "law.json")
    rows = make_plan(candidate_families(law, vocab_size=50_257), Limits(flops=1e13), law).rows
    assert all(row.fields["hidden_size"] == 64 and row.continuous.hidden_size < 64 for row in rows)
    sizes = [(row.family.num_params_trained(64), row.real.tokens) for row in rows]
    tied = [0] * len(rows)
    for draw in law.draws[:MOST_DRAWS]:
        losses = [draw.sized_loss(row.family)(*size) for row, size in zip(rows, sizes)]
        tied = [count + (loss <= min(losses) + law.tie_band) for count, loss in zip(tied, losses)]
    assert [row.fields["best_or_tied_share"] for row in rows] == [
        count / len(law.draws[:MOST_DRAWS]) for count in tied
    ]
    assert rows[0].fields["best_or_tied_share"] > 0.5  # 0.12 when the draws took shapes that can't be built


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bootstrap": 3}, "bootstrap must be a list of draws"),
        ({"bootstrap": [3]}, "bootstrap must be a list of draws"),
        ({"bootstrap": [{}, {"alpha": "steep"}]}, r"bootstrap\[1\].alpha is 'steep'"),
        ({"bootstrap": [{"alpha": 0.5}]}, r"bootstrap\[0\]: this law's loss does not fall"),
        ({"rmse_train": "small"}, "rmse_train is 'small'"),
        ({"rmse_train": -1}, "rmse_train is -1"),
        ({"range": 5}, "range is 5"),
        ({"range": {"num_experts": 8}}, "range.num_experts is 8"),
        ({"range": {"num_experts": [1, None]}}, "range.num_experts is"),
        ({"coefficients": {"eta": "good"}}, "eta is 'good'"),
        ({"coefficients": {"eta": 0}}, "eta is 0"),
        ({"coefficients": {"kappa": float("nan")}}, "kappa is nan"),
        ({"coefficients": {"e_start": 0}}, "e_start is 0 and e_max 290"),
        ({"coefficients": {"e_start": 400}}, "e_start is 400 and e_max 290"),
        ({"coefficients": {"alpha": {}}}, "alpha is None"),
        ({"coefficients": {"c": float("inf")}}, "c is inf"),
    ],
)
def test_bad_fields_of_a_law_file_are_named(law_file, changes, words):
    path = law_file()
    content = json.loads(path.read_text(encoding="utf-8"))
    changes = dict(changes)
    content["coefficients"].update(changes.pop("coefficients", {}))
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")
    with pytest.raises(UserError, match=words) as caught:
        read_law(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_law_without_a_slope_is_refused(law_file):
    with pytest.raises(UserError, match="does not fall"):
        read_law(law_file(beta=0.0, zeta=0.0))
    with pytest.raises(UserError, match="no such file"):
        read_law("missing.json")
