"""Distances from a reference against the full logits; clusters; parts of a model; families against counting."""

import json
import math

import numpy as np
import pytest
import torch

from dsmoe import cli
from dsmoe.config.routing import check_policy
from dsmoe.data.corpus import TokenCorpus
from dsmoe.model import model_inputs, use_routing
from dsmoe.sparsify import compare
from dsmoe.sparsify.calibration import sample_corpus
from dsmoe.sparsify.compare import Comparer, clustered_error, clusters, expected_increase, reference_policies
from dsmoe.sparsify.damage import measure_variants
from dsmoe.sparsify.families import ALLOCATED, GLOBAL, Level, global_policy, knob_for, levels, score_of
from dsmoe.sparsify.sites import find_sites, output_norms
from dsmoe.sparsify.suffix import layers_from, run_layers

MOA = {"num_attention_experts": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "qk_norm": "per_head"}
SPARSE = {
    "mlp": [{"policy": "threshold", "threshold": 1.0}] * 3,
    "attention": [{"policy": "top_k", "k": 2}] * 3,
}


def make_batches(count=2, rows=3, length=12, eos=0):
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(count):
        tokens = torch.randint(eos + 1, 97, (rows, length + 1), generator=generator)
        mask = torch.ones(rows, length, dtype=torch.int64)
        mask[-1, length - 4 :] = 0
        labels = tokens[:, 1:].masked_fill(mask == 0, -100)
        batches.append({"input_ids": tokens[:, :-1], "shift_labels": labels, "attention_mask": mask})
    return batches


@pytest.fixture
def moa(tiny_model):
    return tiny_model(num_hidden_layers=3, **MOA)


def log_probs(model, batch):
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.double().log_softmax(-1)


def test_compare_is_the_kl_and_loss_of_whole_logits(moa):
    batches = make_batches()
    found = compare(moa, batches, SPARSE)
    kls, increases = [], []
    for batch in batches:
        reference = log_probs(moa, batch)
        with use_routing(moa, **SPARSE):
            sparse = log_probs(moa, batch)
        for row, position in (batch["shift_labels"] >= 0).nonzero().tolist():
            p, q, label = (
                reference[row, position],
                sparse[row, position],
                batch["shift_labels"][row, position],
            )
            kls.append(float((p.exp() * (p - q)).sum()))
            increases.append(float(p[label] - q[label]))
    assert found.num_tokens == len(kls)
    assert found.kl == pytest.approx(np.mean(kls), abs=1e-9)
    assert found.loss_increase == pytest.approx(np.mean(increases), abs=1e-9)
    assert found.active.mean("attention") == [2.0] * 3
    assert moa.config.mlp_routing[0] == {"policy": "dense"}


def test_variants_of_a_layer_equal_whole_models(moa):
    comparer = Comparer(moa, make_batches())
    sites = find_sites(moa, comparer.batches, comparer.reference)
    assert [(site.part, site.layer) for site in sites] == [
        (p, i) for p in ("mlp", "attention") for i in range(3)
    ]
    level = Level({"policy": "top_k", "k": 1}, 1.0)
    found = measure_variants(comparer, SPARSE, [(site, level) for site in sites])
    assert found.base.kl.mean() == pytest.approx(comparer(SPARSE).kl, abs=1e-9)
    for site, distance in zip(sites, found.variants):
        changed = {part: list(per_layer) for part, per_layer in SPARSE.items()}
        changed[site.part][site.layer] = level.policy
        whole = comparer(changed)
        assert distance.kl.mean() == pytest.approx(whole.kl, abs=1e-9)
        assert distance.increase.mean() == pytest.approx(whole.loss_increase, abs=1e-9)


def test_layers_are_restored_after_an_error(moa):
    layers = moa.model.layers
    with pytest.raises(RuntimeError), layers_from(moa, 1):
        assert len(moa.model.layers) == 2
        raise RuntimeError
    assert moa.model.layers is layers


@pytest.mark.parametrize("normalized", [False, True])
def test_a_suffix_continues_from_a_layers_input(tiny_model, normalized):
    """Which is no embedding: it must not be normalised as one."""
    moa, batch = tiny_model(num_hidden_layers=3, normalize_embeddings=normalized, **MOA), make_batches(1)[0]
    with torch.inference_mode():
        whole = run_layers(moa, batch, keep_inputs=True)
        rest = run_layers(moa, batch, 2, whole.inputs[2])
    torch.testing.assert_close(rest.hidden, whole.hidden)
    torch.testing.assert_close(rest.router_logits["mlp"][0], whole.router_logits["mlp"][2])


def test_clustered_error_of_singletons_is_the_usual_one_and_of_copies_that_of_the_originals():
    values = np.random.default_rng(0).normal(size=50)
    usual = values.std(ddof=1) / math.sqrt(50)
    assert clustered_error(values, np.arange(50)) == pytest.approx(usual)
    assert clustered_error(values.repeat(4), np.arange(50).repeat(4)) == pytest.approx(usual)
    assert clustered_error(values, np.zeros(50)) == math.inf


def test_clusters_follow_documents_across_windows_and_windows_in_long_ones():
    inputs = torch.tensor([[0, 1, 2, 0, 3, 4], [5, 0, 6, 7, 8, 9], [3, 3, 3, 3, 3, 3]])
    labels = torch.tensor([[1, 2, 0, 3, 4, 5], [0, 6, 7, 8, 9, 1], [3, 3, 3, 3, 3, 3]])
    batch = {"input_ids": inputs, "shift_labels": labels}
    first, second, third = clusters([batch], eos_token_id=0)[0].tolist()
    # the second window begins with the last label of the first; the third with something else
    assert first == [1, 1, 1, 2, 2, 2]
    assert second == [2, 3, 3, 3, 3, 3]
    assert third == [4] * 6
    book = {"input_ids": torch.full((6, 4), 7), "shift_labels": torch.full((6, 4), 7)}
    ids = clusters([book], eos_token_id=0)[0]
    assert (ids == ids[:, :1]).all()
    assert len(ids.unique()) == 6


def test_expected_increase_lies_between_kl_and_measurement():
    assert expected_increase(0.01, 0.012, 0.01) == 0.01  # within the noise
    assert expected_increase(0.01, -0.05, 0.0) == -0.05  # certain
    assert -0.05 < expected_increase(0.01, -0.05, 0.01) < 0.0


@pytest.mark.parametrize("family", ALLOCATED)
@pytest.mark.parametrize("weighted", [False, True])
def test_levels_rise_from_one_expert_to_the_reference(moa, family, weighted):
    batches = make_batches(4)
    sites = find_sites(moa, batches, reference_policies(moa))
    for site in sites[::3]:
        if weighted:
            site.weights = [0.5, 2.0, 1.0, 0.7]
        found = levels(site, family)
        counts = [level.count for level in found]
        assert counts == sorted(set(counts))
        assert counts[0] == pytest.approx(1, abs=0.1)
        assert found[-1].policy == {"policy": "dense"}
        assert counts[-1] == 4
        for level in found:  # the counts are those of the model's own rule
            assert level.count == pytest.approx(site.count(level.policy))
        if family != "per_layer_k":
            assert max(np.diff(counts)) < 0.4


def share_of(sites, policies):
    total = sum(site.cost * site.num_experts for site in sites)
    return sum(site.count(policy) * site.cost for site, policy in zip(sites, policies)) / total


@pytest.mark.parametrize("weighted", [False, True])
def test_one_knob_gives_the_share(moa, weighted):
    sites = find_sites(moa, make_batches(4), reference_policies(moa))
    for site in sites:
        if weighted:
            site.weights = [0.5, 2.0, 1.0, 0.7]
    for family in GLOBAL:
        policies = global_policy(sites, family, knob_for(sites, family, 0.7))
        share = share_of(sites, policies)
        if family == "uniform_k":
            assert share <= 0.7
        else:
            assert share == pytest.approx(0.7, abs=0.05)
        for site, policy in zip(sites, policies):
            ranked = site.part == "mlp" or family != "uniform_k"
            assert policy.get("score_weights") == (site.weights if ranked else None)
            assert check_policy(policy, 4) == policy


def test_weights_change_what_one_knob_keeps(moa):
    """Against the rule written out: N * p * w above the threshold, or the best."""
    site = find_sites(moa, make_batches(4), reference_policies(moa))[0]
    site.weights = [0.5, 2.0, 1.0, 0.7]
    scores_TN = 4 * site.probs_TN * torch.tensor(site.weights)
    (policy,) = global_policy([site], "global_threshold", 1.1)
    expected = ((scores_TN > 1.1) | (scores_TN == scores_TN.amax(-1, keepdim=True))).sum(-1)
    assert site.count(policy) == pytest.approx(float(expected.double().mean()))
    # the highest threshold that anything could be above
    (policy,) = global_policy([site], "global_threshold", 100.0)
    assert check_policy(policy, 4)["threshold"] == 8.0
    assert site.count(policy) == 1


def test_one_threshold_gives_the_share_of_routers_that_are_nearly_certain(moa):
    sites = find_sites(moa, make_batches(4), reference_policies(moa))
    for site in sites:
        site.probs_TN = (site.probs_TN.log() * 25).softmax(-1)
    knob = knob_for(sites, "global_threshold", 0.8)
    assert 0 < knob < math.exp(-12)
    assert share_of(sites, global_policy(sites, "global_threshold", knob)) == pytest.approx(0.8, abs=0.01)


def test_the_score_is_that_of_the_policies():
    weighted = {"policy": "top_k", "k": 2, "score_weights": [1.0, 2.0]}
    dense, plain = {"policy": "dense"}, {"policy": "top_k", "k": 2}
    assert score_of({"mlp": [dense], "attention": [dense]}) is None
    assert score_of({"mlp": [plain, dense], "attention": [dense]}) == "gate"
    assert score_of({"mlp": [dense, weighted], "attention": [dense]}) == "gate_norm"


@pytest.mark.parametrize("gates", ["softmax", "l2", "renormalized"])
def test_output_norms_are_those_of_each_expert(tiny_model, gates):
    model = tiny_model(num_hidden_layers=2, gate_normalization=gates)
    batch = make_batches(1)[0]
    reference = reference_policies(model)
    sites = find_sites(model, [batch], reference)
    found = output_norms(model, [batch], sites, reference)
    seen = {}
    mlp = model.model.layers[1].mlp
    hook = mlp.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    with torch.no_grad():
        run_layers(model, batch)
        hook.remove()
        x_TD = seen["x"][batch["attention_mask"].bool()]
        probs_TN = mlp.router(x_TD).softmax(-1)
        norms = []
        for expert in range(4):
            gates_TN = torch.zeros_like(probs_TN)
            gates_TN[:, expert] = 1.0
            norms.append(mlp.experts(x_TD, gates_TN).norm(dim=-1))
    if gates == "softmax":  # weighted by p
        expected = [float((n * p).sum() / p.sum()) for n, p in zip(norms, probs_TN.T)]
    elif gates == "l2":
        weights = probs_TN / probs_TN.norm(dim=-1, keepdim=True)
        expected = [float((n * w).sum() / w.sum()) for n, w in zip(norms, weights.T)]
    else:
        expected = [float(n.mean()) for n in norms]
    mean = sum(expected) / 4
    assert found[1] == pytest.approx([norm / mean for norm in expected], abs=2e-3)


def test_documents_that_batches_name_are_the_clusters(tmp_path):
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(["a", "bb", "ccc", "dd"], size=size)) for size in [400] + 30 * [40]]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    prepare = ["data", "prepare", "--source", f"words={tmp_path / 'text.jsonl'}", "--train-tokenizer", "300"]
    assert cli.main([*prepare, "--validation-fraction", "0.4", "--output", str(tmp_path / "data")]) == 0
    corpus = TokenCorpus(tmp_path / "data")
    split = "train" if corpus.num_documents("train") > 12 else "validation"
    text = sample_corpus(corpus, split, 10**6, 8, 4, seed=0)
    stream = corpus.stream("words", split).read(0, len(corpus.stream("words", split)))
    # the eos token belongs to the document that it ends
    whole = np.concatenate([[0], (stream == corpus.eos_token_id).cumsum()[:-1]])
    found = {}
    for batch in text.batches:
        for labels, ids in zip(batch["shift_labels"].tolist(), batch["documents"].tolist()):
            found[tuple(labels)] = ids
    for start in range(1, len(stream) - 7, 8):
        assert found[tuple(stream[start : start + 8])] == whole[start : start + 8].tolist()
    assert clusters(text.batches, corpus.eos_token_id)[0] is text.batches[0]["documents"]
    assert "documents" not in model_inputs(text.batches[0])
    few = [{**batch, "documents": batch["documents"] // 100} for batch in text.batches]
    assert clusters(few, corpus.eos_token_id)[0] is not few[0]["documents"]
