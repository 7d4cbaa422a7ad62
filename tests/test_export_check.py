"""The check of an export: ties that two models break differently are excused, other differences are not."""

import pytest
import torch

from dsmoe.errors import UserError
from dsmoe.export.check import EXACT, Outputs, compare, require_agreement

K, LAYERS, BATCH, LENGTH, EXPERTS, VOCAB = 2, 3, 4, 10, 5, 16


def outputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    # gaps of 1 between neighbours, in random order
    order = torch.rand(LAYERS, BATCH, LENGTH, EXPERTS, generator=generator).argsort(-1)
    return Outputs(torch.randn(BATCH, LENGTH, VOCAB, generator=generator), order.double())


def swap_last_kept(routers, layer, row, position, gap):
    """The routers of a model that keeps the next expert for one token; sets the `gap` of the two in `routers` too."""
    ranked = routers[layer, row, position].argsort(descending=True)
    first, second = ranked[K - 1], ranked[K]
    routers[layer, row, position, second] = routers[layer, row, position, first] - gap
    other = routers.clone()
    other[layer, row, position, [first, second]] = other[layer, row, position, [second, first]]
    return other


def test_equal_outputs_agree():
    agreement = compare(outputs(), outputs(), K)
    assert agreement.max_abs_logit_difference == 0.0
    assert agreement.argmax_agreement == 1.0
    assert (agreement.num_positions, agreement.num_positions_after_tie) == (BATCH * LENGTH, 0)
    require_agreement(agreement, EXACT, 1.0)


def test_a_tie_excuses_its_position_and_later_ones_of_its_sequence():
    original = outputs()
    routers = swap_last_kept(original.router_logits, layer=1, row=2, position=6, gap=1e-6)
    logits = original.logits.clone()
    logits[2, 6:] += 1.0
    agreement = compare(original, Outputs(logits, routers), K)
    assert agreement.num_positions_after_tie == LENGTH - 6
    assert agreement.largest_tie == pytest.approx(1e-6, rel=1e-3)
    assert agreement.max_relative_difference == 0.0
    assert agreement.max_abs_logit_difference == pytest.approx(1.0)
    require_agreement(agreement, EXACT, 1.0)


def test_a_difference_before_the_tie_is_not_excused():
    original = outputs()
    routers = swap_last_kept(original.router_logits, layer=0, row=2, position=6, gap=1e-6)
    logits = original.logits.clone()
    logits[2, 5] += 0.1
    with pytest.raises(UserError, match="largest relative difference"):
        require_agreement(compare(original, Outputs(logits, routers), K), EXACT, 1.0)


def test_another_expert_without_a_tie_is_refused():
    original = outputs()
    routers = swap_last_kept(original.router_logits, layer=0, row=1, position=3, gap=0.5)
    with pytest.raises(UserError, match="tie of experts"):
        require_agreement(compare(original, Outputs(original.logits, routers), K), EXACT, 1.0)


def test_what_follows_a_tie_is_not_judged_as_one():
    # in a deeper layer, and at a later position, the inputs already differ
    original = outputs()
    routers = swap_last_kept(original.router_logits, layer=0, row=1, position=3, gap=1e-6)
    for layer, position in ((2, 3), (0, 7)):
        ranked = routers[layer, 1, position].argsort(descending=True)
        routers[layer, 1, position, ranked[0]], routers[layer, 1, position, ranked[-1]] = -9.0, 9.0
    agreement = compare(original, Outputs(original.logits, routers), K)
    assert agreement.largest_tie == pytest.approx(1e-6, rel=1e-3)
    assert agreement.num_positions_after_tie == LENGTH - 3


def test_ties_everywhere_hide_no_general_fault():
    original = outputs()
    routers = original.router_logits.clone()
    for row in range(BATCH):
        routers[:, row] = swap_last_kept(original.router_logits, 0, row, position=0, gap=1e-6)[:, row]
    shifted = Outputs(original.logits + 1.0, routers)
    with pytest.raises(UserError, match="median"):
        require_agreement(compare(original, shifted, K), EXACT, 1.0)


def test_not_a_number_is_refused():
    original = outputs()
    logits = original.logits.clone()
    logits[0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="nan"):
        require_agreement(compare(original, Outputs(logits, original.router_logits), K), EXACT, 1.0)
