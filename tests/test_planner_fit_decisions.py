"""Identification, bootstrap intervals and decisions."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import optimize
from test_planner_fit_solver import sweep

from dsmoe.errors import UserError
from dsmoe.planner.fit import Run, fit_law
from dsmoe.planner.fit.bootstrap import interval
from dsmoe.planner.fit.decisions import decide, optimum
from dsmoe.planner.fit.fitting import Settings
from dsmoe.planner.fit.report import as_json, human_report
from dsmoe.planner.fit.structure import choose_structure
from dsmoe.planner.lawfile import read_law
from dsmoe.planner.laws import COEFFICIENTS, PUBLISHED_JOINT, TIE_BAND

TRUTH = {name: np.array([getattr(PUBLISHED_JOINT, name)]) for name in COEFFICIENTS}


def coverage(seeds, sizes, ratios, draws, level=0.9):
    """Share of the seeds in which the interval of D_opt covers the truth, by (FLOPs, E)."""
    hits = {}
    for seed in range(seeds):
        fit = fit_law(sweep(0.006, seed, sizes, ratios), Settings(hold_out=0.0, draws=draws))
        for flops in (1e20, 1e21, 1e22):
            for experts in (1, 8, 32):
                low, high = interval(optimum(fit.draws, experts, flops)[1], level)
                true = optimum(TRUTH, experts, flops)[1][0]
                hits.setdefault((flops, experts), []).append(low <= true <= high)
    return {key: float(np.mean(values)) for key, values in hits.items()}


def test_intervals_cover_the_optimal_tokens():
    found = coverage(seeds=15, sizes=4, ratios=3, draws=80)
    assert np.mean(list(found.values())) >= 0.8, found


@pytest.mark.slow
def test_intervals_cover_the_optimal_tokens_in_50_seeds():
    for sizes, ratios in ((6, 5), (4, 3)):
        found = coverage(seeds=50, sizes=sizes, ratios=ratios, draws=200)
        assert min(found.values()) >= 0.8, found


@pytest.mark.parametrize(
    "sigma,seed,sizes", [(0.0, 0, 6), (0.006, 0, 6), (0.006, 1, 6), (0.006, 2, 9), (0.003, 3, 9)]
)
def test_e_max_is_not_identified_on_the_laws_own_design(sigma, seed, sizes):
    fit = fit_law(sweep(sigma, seed, sizes, 5), Settings(draws=0, hold_out=0.0))
    assert not fit.profiles["e_max"].identified
    assert any("not identified: " in note and "e_max" in note for note in fit.notes)
    assert fit.profiles["alpha"].identified and fit.profiles["c"].identified


def test_a_profile_is_what_a_fit_with_the_coefficient_held_finds():
    """Oracle: hold c at half its value in an ordinary optimiser."""
    runs = sweep(0.006, 0, 4, 4, experts=(1,))
    fit = fit_law(runs, Settings(draws=0, hold_out=0.0))
    size, tokens = (np.log([getattr(r, n) for r in runs]) for n in ("num_params_active", "tokens"))
    loss = np.log([r.loss for r in runs])

    def residual(p, log_c):
        terms = [
            p[0] + p[1] * (size - size.mean()),
            p[2] + p[3] * (tokens - tokens.mean()),
            np.full(len(loss), log_c),
        ]
        return np.logaddexp.reduce(terms, axis=0) - loss

    def held(log_c):
        start = [0.0, fit.values["alpha"], 0.0, fit.values["beta"]]
        return optimize.least_squares(
            residual, start, args=(log_c,), xtol=1e-14, ftol=1e-14, gtol=1e-14, max_nfev=2000
        )

    least = 2 * held(np.log(fit.values["c"])).cost
    deviance = min(
        (2 * held(np.log(fit.values["c"] * factor)).cost - least) / (least / (len(runs) - 5))
        for factor in (2, 0.5)
    )
    # all residuals are well within the quadratic part of the Huber loss for the smaller of the two moves
    assert fit.profiles["c"].deviance == pytest.approx(deviance, rel=0.02)


@pytest.mark.parametrize("experts", [1, 8, 32])
@pytest.mark.parametrize("flops", [1e18, 1e22])
def test_closed_form_equals_a_numeric_optimum(experts, flops):
    params, tokens, loss = (float(found[0]) for found in optimum(TRUTH, experts, flops))

    def at(log_params):
        return PUBLISHED_JOINT.loss(np.exp(log_params), flops / 6 / np.exp(log_params), experts)

    numeric = optimize.minimize_scalar(
        at, bounds=(np.log(1e5), np.log(1e13)), method="bounded", options={"xatol": 1e-8}
    )
    assert params == pytest.approx(np.exp(numeric.x), rel=1e-3)
    assert loss == pytest.approx(numeric.fun, abs=1e-9)
    assert 6 * params * tokens == pytest.approx(flops)


def test_an_exponent_above_zero_has_no_optimum():
    bad = {**TRUTH, "alpha": np.array([0.5])}
    assert np.isnan(optimum(bad, 1, 1e20)[1][0])


def test_eta_shifts_the_optimum_of_a_dsmoe():
    plain, worse = optimum(TRUTH, 1, 1e20, 1.0), optimum(TRUTH, 1, 1e20, 0.5)
    assert worse[2][0] > plain[2][0]
    numeric = PUBLISHED_JOINT.loss(0.5 * worse[0][0], worse[1][0], 1)
    assert worse[2][0] == pytest.approx(numeric)


@pytest.mark.parametrize("eta", [1.0, 0.8])
def test_a_dsmoe_is_advised_by_the_dense_law(eta):
    """With eta 1 it is its dense twin, whatever the law says of sparse experts."""
    ones = sweep(0.006, 0, 4, 4, experts=(1, 8))
    twins = [dataclasses.replace(run, kind="dsmoe", num_experts=32) for run in ones if run.kind == "dense"]
    etas = (np.array([eta]), np.full(3, eta))
    draws = {name: np.repeat(values, 3) for name, values in TRUTH.items()}
    found = decide(TRUTH, draws, [*ones, *twins], 1e20, etas)
    dense, smoe, dsmoe = found["options"]
    assert [option["kind"] for option in found["options"]] == ["dense", "smoe", "dsmoe"]
    assert dsmoe["num_experts"] == 32.0 and smoe["loss"]["value"] < dense["loss"]["value"]
    size, tokens = dsmoe["num_params_total"]["value"], dsmoe["tokens"]["value"]
    assert dsmoe["loss"]["value"] == pytest.approx(PUBLISHED_JOINT.loss(eta * size, tokens, 1))
    if eta == 1.0:
        assert dsmoe["loss"] == dense["loss"] and tokens == dense["tokens"]["value"]
    else:
        assert dsmoe["loss"]["value"] > dense["loss"]["value"]


def test_bootstrap_is_seeded_and_both_methods_agree_roughly():
    runs = sweep(0.006, 0, 4, 4)
    fits = [
        fit_law(runs, Settings(hold_out=0.0, draws=60, seed=seed, method=method))
        for seed, method in ((1, "residuals"), (1, "residuals"), (2, "residuals"), (1, "runs"))
    ]
    beta = [fit.draws["beta"] for fit in fits]
    assert np.array_equal(beta[0], beta[1]) and not np.array_equal(beta[0], beta[2])
    widths = [np.subtract(*interval(optimum(fit.draws, 8, 1e20)[1])[::-1]) for fit in (fits[0], fits[3])]
    assert 0.4 < widths[0] / widths[1] < 2.5


def test_seeds_of_a_configuration_are_resampled_together():
    """Three copies of each run tell no more than one: the interval must not shrink by the root of three."""
    runs = sweep(0.006, 0, 4, 4, experts=(1,))
    copies = [run for run in runs for _ in range(3)]
    for method in ("residuals", "runs"):
        once, thrice = (
            fit_law(some, Settings(hold_out=0.0, draws=200, method=method)).draws["alpha"]
            for some in (runs, copies)
        )
        assert 0.7 < np.std(thrice) / np.std(once) < 1.3


def test_held_out_are_the_largest_and_all_runs_make_the_law():
    runs = sweep(0.0, 0, 5, 4)
    fit = fit_law(runs, Settings(draws=0, hold_out=0.15))
    held = [runs[i] for i in fit.held_out]
    rest = [run for i, run in enumerate(runs) if i not in fit.held_out]
    assert len(held) >= 0.15 * len(runs)
    assert min(run.num_params_total for run in held) > max(run.num_params_total for run in rest)
    assert fit.rmse_held_out < 1e-5  # noise-free: predicted
    assert fit.rmse_train < 1e-9


def test_json_has_what_others_read():
    content = as_json(fit_law(sweep(0.006, 0, 4, 4), Settings(draws=20)), [1e20])
    assert set(content) >= {
        "law",
        "coefficients",
        "rmse_train",
        "rmse_held_out",
        "bootstrap",
        "range",
        "decisions",
        "notes",
    }
    assert set(content["coefficients"]) == set(COEFFICIENTS)
    for entry in content["coefficients"].values():
        assert {"value", "interval", "identified"} <= set(entry)
    assert len(content["bootstrap"]) == 20 and set(content["bootstrap"][0]) == set(COEFFICIENTS)
    assert content["range"]["num_experts"] == [1, 32]
    (decision,) = content["decisions"]
    assert decision["best"]["kind"] == "smoe" and decision["best"]["num_experts"] == 32
    assert sum(option["share_best"] for option in decision["options"]) == pytest.approx(1)
    low, high = decision["options"][0]["tokens"]["interval"]
    assert low <= decision["options"][0]["tokens"]["value"] <= high
    text = human_report(content)
    assert "e_max" in text and "1e+20 training FLOPs" in text


def test_without_a_bootstrap_nothing_is_said_of_certainty():
    content = as_json(fit_law(sweep(0.006, 0, 4, 4), Settings(draws=0, hold_out=0.0)), [1e20])
    (decision,) = content["decisions"]
    assert decision["best"]["share_best"] is None
    for option in decision["options"]:
        assert option["share_best"] is None
        assert [option[name]["interval"] for name in ("num_params_active", "tokens", "loss")] == [None] * 3
        assert option["loss"]["value"] > 0
    assert all(entry["interval"] is None for entry in content["coefficients"].values())
    rows = [line for line in human_report(content).splitlines() if line.startswith("| smoe")]
    assert rows and all("%" not in row and "[" not in row for row in rows)
    assert interval(np.array([3.0])) is None  # one draw has no width


def test_ties_are_judged_as_the_planner_judges_them(tmp_path):
    fit = fit_law(sweep(0.03, 0, 4, 4), Settings(draws=0, hold_out=0.0))
    content = as_json(fit, [1e20])
    path = tmp_path / "law.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    band = read_law(path).tie_band
    assert band == fit.rmse_train > 2 * TIE_BAND
    options = content["decisions"][0]["options"]
    assert all(option["tie"] == (option["loss_gap"] <= band) for option in options)
    assert any(TIE_BAND < option["loss_gap"] <= band for option in options)


def test_the_range_tells_the_active_shares_of_ds_moes_where_all_know_it():
    runs = sweep(0.0, 0, 4, 3)
    dense = [run for run in runs if run.num_experts == 1]
    some = [
        dataclasses.replace(run, kind="dsmoe", num_experts=16, active_share=share)
        for run, share in zip(dense, (0.31, 0.35, 0.33))
    ]
    fitted = fit_law(runs + some, Settings(draws=0, hold_out=0.0))
    assert as_json(fitted)["range"]["dsmoe_active_share"] == [0.31, 0.35]
    unknown = dataclasses.replace(
        fitted, runs=(*runs, *some[1:], dataclasses.replace(some[0], active_share=None))
    )
    assert "dsmoe_active_share" not in as_json(unknown)["range"]


def test_what_the_design_leaves_open_is_fixed_and_said():
    one_e = fit_law(
        [run for run in sweep() if run.num_experts == 8], Settings(law="joint", draws=0, hold_out=0.0)
    )
    assert not {"gamma", "delta", "zeta", "omega", "e_max"} & set(one_e.profiles)
    assert any("all runs have E = 8" in note for note in one_e.notes)
    tokens = 2e10
    flat = [
        Run(r.kind, r.num_experts, r.num_params_active, r.num_params_total, tokens,
            PUBLISHED_JOINT.loss(r.num_params_active, tokens, r.num_experts))
        for r in sweep(ratios=1, sizes=6)
    ]  # fmt: skip
    fit = fit_law(flat, Settings(draws=10, hold_out=0.0))
    content = as_json(fit)
    assert fit.values["b"] == 0 and not content["coefficients"]["beta"]["identified"]
    assert content["decisions"] == []  # nothing to balance
    assert any("tokens hardly vary" in note for note in fit.notes)
    two = choose_structure([run for run in sweep() if run.num_experts in (1, 4)])
    assert not {"start", "saturation"} & set(two.free)


def test_too_few_runs_are_refused():
    with pytest.raises(UserError, match="3 distinct runs can't determine"):
        fit_law(sweep(experts=(1,), sizes=3, ratios=1), Settings(draws=0, law="chinchilla"))
    with pytest.raises(UserError, match="neither parameters nor tokens vary"):
        fit_law([Run("dense", 1, 1e8, 1e8, 1e9, 3.0)] * 5)
    with pytest.raises(UserError, match="Chinchilla form is for dense"):
        fit_law(sweep(), Settings(law="chinchilla"))
    with pytest.raises(UserError, match="all runs are DS-MoEs"):
        fit_law([Run("dsmoe", 4, n / 2, n, d, 3.0) for n in (1e7, 1e8, 1e9) for d in (1e9, 1e10, 1e11)])


def test_a_coefficient_whose_interval_holds_zero_is_not_identified():
    fit = fit_law(sweep(0.006, 0, 4, 4, experts=(1,)), Settings(draws=0, hold_out=0.0))
    assert fit.identified("alpha")
    around_zero, away = np.linspace(-0.2, 0.1, 50), np.linspace(-0.2, -0.1, 50)
    assert not dataclasses.replace(fit, draws={"alpha": around_zero}).identified("alpha")
    assert dataclasses.replace(fit, draws={"alpha": away}).identified("alpha")
    assert not fit.identified("a coefficient that this form doesn't have")
