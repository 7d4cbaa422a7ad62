"""Optima: closed form against a numeric one, the source's numbers, and properties that must hold for any limits."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from dsmoe.planner import Limits, candidate_families, make_plan
from dsmoe.planner.lawfile import published
from dsmoe.planner.laws import PUBLISHED_JOINT, PUBLISHED_TABULATED, TIE_BAND
from dsmoe.planner.memory import Serving
from dsmoe.planner.optimum import closed_form, nearest_shape, optimal_tokens, optimise
from dsmoe.planner.shapes import Family

LAW = published()
FAMILIES = candidate_families(LAW)
LAW_FAMILIES = candidate_families(LAW, kinds=("dense", "smoe"))
quick = settings(deadline=None, max_examples=25)
budgets = st.floats(18, 26).map(lambda power: 10**power)
memories = st.floats(9, 13).map(lambda power: 10**power)
demands = st.one_of(st.just(0.0), st.floats(9, 14).map(lambda power: 10**power))


def loss_of(family, law=LAW):
    return law.fit.sized_loss(family)


@pytest.mark.parametrize("experts", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("flops", [1e18, 1e22, 1e26])
@pytest.mark.parametrize("law", [PUBLISHED_JOINT, PUBLISHED_TABULATED])
def test_closed_form_is_the_numeric_optimum(law, experts, flops):
    reduced = law.at(experts)
    num_params, tokens = closed_form(reduced, flops)
    assert 6 * num_params * tokens == pytest.approx(flops, rel=1e-12)

    def loss(log_params):
        return reduced.loss(math.exp(log_params), flops / 6 / math.exp(log_params))

    numeric = minimize_scalar(
        loss, bounds=(math.log(1e3), math.log(1e15)), method="bounded", options={"xatol": 1e-10}
    )
    assert math.exp(numeric.x) == pytest.approx(
        num_params, rel=1e-5
    )  # the minimum is flat to the square of this
    assert numeric.fun == pytest.approx(loss(math.log(num_params)), rel=1e-12)
    assert optimal_tokens(reduced, num_params) == pytest.approx(tokens, rel=1e-9)

    family = Family("smoe" if experts > 1 else "dense", experts)
    found = optimise(family, reduced.loss, Limits(flops=flops))
    assert found.loss == pytest.approx(loss(math.log(num_params)), rel=1e-12)
    assert family.num_params_active(found.hidden_size) == pytest.approx(num_params, rel=1e-5)
    assert found.binding == ("flops",)


@pytest.mark.parametrize(
    ("experts", "num_params", "tokens"), [(1, 18.8, 88.6), (8, 14.4, 115.8), (32, 12.2, 136.9)]
)
@pytest.mark.parametrize("tabulated", [False, True])
def test_the_numbers_of_the_source_at_1e22(experts, num_params, tokens, tabulated):
    law = published(tabulated)
    rows = make_plan(candidate_families(law), Limits(flops=1e22), law).rows
    row = next(row for row in rows if row.family.kind != "dsmoe" and row.family.num_experts == experts)
    found = row.fields["continuous"]
    assert found["num_params_active"] == pytest.approx(num_params * 1e9, rel=0.012)
    assert found["tokens"] == pytest.approx(tokens * 1e9, rel=0.012)


def test_the_hardware_table():
    """Nine cells of optimal experts: at least seven equal, the rest one doubling off and ties."""
    table = {1e21: (16, 32, 32), 1e22: (4, 16, 32), 1e23: (1, 8, 32)}
    equal = 0
    for flops, wanted_row in table.items():
        for memory, wanted in zip((24e9, 80e9, 640e9), wanted_row):
            limits = Limits(flops=flops, memory_bytes=memory, serving=Serving(16_384))
            rows = make_plan(LAW_FAMILIES, limits, LAW).rows
            best = rows[0].family.num_experts
            continuous = min(rows, key=lambda row: row.continuous.loss)
            assert continuous.family.num_experts == best
            if best == wanted:
                equal += 1
                continue
            assert abs(math.log2(best / wanted)) == 1
            miss = next(row for row in rows if row.family.num_experts == wanted)
            assert miss.fields["tie"]
            assert miss.continuous.loss - continuous.continuous.loss <= TIE_BAND
    assert equal >= 7


@pytest.mark.parametrize("experts", [2, 4, 8])
@pytest.mark.parametrize("total", [1.1e9, 1e10, 1e11])
@pytest.mark.parametrize("law", [PUBLISHED_JOINT, PUBLISHED_TABULATED])
def test_rule_of_thumb(law, total, experts):
    """An MoE of the same total size on E times the tokens beats the compute-optimal dense model."""
    tokens = optimal_tokens(law.at(1), total)
    family = Family("smoe", experts)
    active = family.num_params_active(family.hidden_size_of(total))
    assert law.loss(active, experts * tokens, experts) < law.loss(total, tokens, 1)


@quick
@given(
    flops=budgets,
    memory=memories,
    more=st.floats(1, 10),
    demand=demands,
    context=st.sampled_from([0, 16_384]),
)
def test_more_memory_or_flops_is_never_worse(flops, memory, more, demand, context):
    def best(flops, memory):
        limits = Limits(flops, demand, memory, serving=Serving(context))
        optima = [(f, optimise(f, loss_of(f), limits)) for f in FAMILIES]
        real = [nearest_shape(f, loss_of(f), limits, optimum) for f, optimum in optima if optimum]
        return (
            min((optimum.loss for _, optimum in optima if optimum), default=math.inf),
            min((shape.loss for shape in real if shape), default=math.inf),
        )

    base = best(flops, memory)
    for other in (best(flops * more, memory), best(flops, memory * more)):
        assert all(new <= old + 1e-9 for new, old in zip(other, base))


@quick
@given(flops=budgets, memory=memories, demand=demands, family=st.sampled_from(FAMILIES))
def test_the_chosen_shape_is_the_best_of_all_real_shapes(flops, memory, demand, family):
    limits, loss = Limits(flops, demand, memory, max_tokens=1e12), loss_of(family)
    optimum = optimise(family, loss, limits)
    assume(optimum is not None)
    found = nearest_shape(family, loss, limits, optimum)
    sizes = [size for size in range(family.step, 60_000, family.step) if limits.fits(family, size)]
    losses = [loss(family.num_params_trained(size), limits.tokens(family, size)[0]) for size in sizes]
    if not losses:
        assert found is None
        return
    assert found.loss == pytest.approx(min(losses), rel=1e-12)
    assert optimum.loss <= found.loss + 1e-12
    used = 6 * family.num_params_trained(found.hidden_size) * found.tokens
    used += 2 * family.num_params_active(found.hidden_size) * demand
    assert used <= flops * (1 + 1e-9)
    assert limits.serving.total_bytes(family, found.hidden_size) <= memory
    assert found.tokens <= 1e12


@quick
@given(flops=budgets, memory=memories, eta=st.floats(0.3, 1), demand=demands)
def test_dsmoe_with_one_expert_and_eta_1_is_the_dense_row(flops, memory, eta, demand):
    limits = Limits(flops, demand, memory)
    dense, one = Family("dense"), Family("dsmoe", 1, 0.33)
    assert optimise(one, loss_of(one), limits) == optimise(dense, loss_of(dense), limits)
    lower = LAW.with_eta(eta)
    worse = optimise(one, loss_of(one, lower), limits)
    same = optimise(dense, loss_of(dense, lower), limits)
    assert (worse is None) == (same is None)
    assert worse is None or worse.loss >= same.loss - 1e-12


@quick
@given(flops=budgets, memory=memories, family=st.sampled_from(FAMILIES))
def test_no_inference_demand_is_plain_training(flops, memory, family):
    with_zero = Limits(flops, 0.0, memory)
    assert optimise(family, loss_of(family), with_zero) == optimise(
        family, loss_of(family), Limits(flops, memory_bytes=memory)
    )
    size = 1024.0
    assert with_zero.flops_tokens(family, size) == flops / (6 * family.num_params_trained(size))


def test_binding_limits_are_named():
    family = Family("dense")

    def binding(**limits):
        return set(optimise(family, loss_of(family), Limits(**limits)).binding)

    assert binding(flops=1e22) == {"flops"}
    assert binding(flops=1e22, memory_bytes=24e9) == {"flops", "memory"}
    assert binding(flops=1e22, memory_bytes=24e12) == {"flops"}
    assert binding(flops=1e22, training_memory_bytes=80e9) == {"flops", "training_memory"}
    assert binding(memory_bytes=24e9, max_tokens=1e12) == {"memory", "tokens"}
    assert binding(memory_bytes=24e9, max_tokens_per_param=20) == {"memory", "tokens_per_param"}
    assert binding(flops=1e22, max_tokens=2e10) == {"flops", "tokens"}  # larger until the tokens run out
    assert binding(total_params=1e9, flops=1e21) == {"total_params", "flops"}


def test_dsmoe_pays_for_all_in_training_and_for_the_active_in_inference():
    dense, dsmoe = Family("dense"), Family("dsmoe", 32, 0.33)
    plain, served = Limits(1e23, memory_bytes=24e9), Limits(1e23, 5e12, 24e9)
    free = Limits(1e23)
    assert optimise(dsmoe, loss_of(dsmoe), free).loss == optimise(dense, loss_of(dense), free).loss
    # memory holds its routers, which the law doesn't count
    lead = optimise(dsmoe, loss_of(dsmoe), plain).loss - optimise(dense, loss_of(dense), plain).loss
    assert 0 < lead < 1e-4
    assert optimise(dsmoe, loss_of(dsmoe), served).loss < optimise(dense, loss_of(dense), served).loss
    size = 2048
    spent = 6 * dsmoe.num_params_total(size) * served.flops_tokens(
        dsmoe, size
    ) + 2 * 5e12 * dsmoe.num_params_active(size)
    assert spent == pytest.approx(1e23, rel=1e-12)
