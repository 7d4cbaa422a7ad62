"""Calibrated sparsity on text drawn from the model itself, where the expected loss increase IS the KL divergence."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dsmoe import DSMoEConfig, DSMoEForCausalLM
from dsmoe.accounting import inference_flops_per_token
from dsmoe.checkpoint import save_pretrained
from dsmoe.cli import main
from dsmoe.errors import UserError
from dsmoe.model import set_routing
from dsmoe.sparsify import Comparison, Frontier, calibrate, compare, remove_unused, sample_documents
from dsmoe.sparsify.arguments import increase
from dsmoe.sparsify.budget import _check_removal, _hint
from dsmoe.sparsify.families import GLOBAL

VOCAB = 48
MOA = {"num_attention_experts": 4, "num_attention_heads": 8, "qk_norm": "per_head"}


def make_model(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_experts": 8,
            "num_attention_heads": 4,
            "initializer_range": 0.25,  # routers that decide
            "tie_word_embeddings": False,
            **changes,
        }
        model = DSMoEForCausalLM(DSMoEConfig(**config, eos_token_id=0)).eval()
        model.lm_head.weight.data *= 0.3
        # layers of unequal weight: there is something to allocate
        for scale, layer in zip((1.5, 0.3, 1.0), model.model.layers):
            layer.mlp.experts.down_proj.data *= scale
        return model


@torch.no_grad()
def draw_batches(model, windows, length=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCAB, (windows, 1), generator=generator)
    for _ in range(length):
        probs = model(tokens).logits[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probs, 1, generator=generator)], 1)
    batches = []
    for at in range(0, windows, 32):
        rows = tokens[at : at + 32]
        batches.append(
            {
                "input_ids": rows[:, :-1],
                "shift_labels": rows[:, 1:],
                "attention_mask": torch.ones_like(rows[:, 1:]),
            }
        )
    return batches


@pytest.fixture(scope="module")
def dsmoe():
    model = make_model()
    batches = draw_batches(model, 96)
    return model, batches, calibrate(model, batches, curve_tokens=600)


def test_share_is_met_and_no_one_knob_policy_is_better(dsmoe):
    _, _, frontier = dsmoe
    for share in (0.2, 0.35, 0.6):
        found = frontier.at_share(share)
        assert found.share == pytest.approx(share, abs=0.01)
        for rival in ("uniform_k", "global_threshold"):
            other = frontier.at_share(share, rival)
            if other.share < share + 0.003:
                assert found.comparison.damage <= other.comparison.damage + 1e-9


def test_allocation_beats_uniform_k_on_held_out_text(dsmoe):
    model, _, frontier = dsmoe
    held_out = draw_batches(model, 96, seed=1)
    ours = compare(model, held_out, frontier.at_share(0.25).policies)
    uniform = compare(model, held_out, frontier.at_share(0.25, "uniform_k").policies)
    assert ours.kl < 0.75 * uniform.kl


def test_bound_holds_on_held_out_text(dsmoe):
    model, _, frontier = dsmoe
    held_out = draw_batches(model, 96, seed=2)
    shares = []
    for bound in (0.03, 0.1):
        found = frontier.within(bound)
        assert found.comparison.upper <= bound
        assert found.policies["attention"] == [{"policy": "dense"}] * 3
        held = compare(model, held_out, found.policies)
        assert held.loss_increase <= bound + 2 * held.standard_error
        uniform = frontier.within(bound, "uniform_k")
        assert found.share <= uniform.share
        shares.append(found.share)
    assert shares[1] < shares[0] < 1


def test_bounds_that_cannot_be_met_name_the_best_value(dsmoe):
    _, _, frontier = dsmoe
    with pytest.raises(UserError, match=r"best found is -?0\.\d+"):
        frontier.within(-5.0)
    with pytest.raises(UserError, match=r"0\.125"):
        frontier.at_share(0.05)
    assert frontier.within(0.0).comparison.upper <= 0.0


@pytest.mark.parametrize("score", ["gate", "gate_norm"])
def test_attention_experts_compete_with_mlp_experts(score):
    model = make_model(**MOA)
    batches = draw_batches(model, 48)
    frontier = calibrate(model, batches, score=score, curve_tokens=600)
    found = frontier.at_share(0.4)
    means = {part: found.comparison.active.mean(part) for part in ("mlp", "attention")}
    # 32 * 8 parameters a head and projection pair, 3 * 32 * 16 an MLP expert
    mlp, attention = 3 * 32 * 16, 2 * 32 * 8
    share = (sum(means["mlp"]) * mlp + sum(means["attention"]) * attention) / (3 * (8 * mlp + 4 * attention))
    assert found.share == pytest.approx(share)
    assert share == pytest.approx(0.4, abs=0.01)
    assert min(means["attention"]) < 4


def test_an_smoe_is_compared_with_its_trained_k():
    model = make_model(kind="smoe", mlp_routing={"policy": "top_k", "k": 4})
    frontier = calibrate(model, draw_batches(model, 48), curve_tokens=600)
    assert frontier.reference_share == 0.5
    found = frontier.within(0.05)
    assert found.share < 0.5
    assert found.comparison.upper <= 0.05
    assert frontier.within(0.0).share <= 0.5
    with pytest.raises(UserError, match=r"0\.5"):
        frontier.at_share(0.8)


def test_removing_unused_experts_changes_nothing(dsmoe):
    model = make_model()
    batches = draw_batches(model, 32)
    for layer, expert in ((0, 5), (2, 1)):  # rarely chosen, and never
        weight = model.model.layers[layer].mlp.router.weight.data
        weight[expert] *= 0.0 if layer else 0.4
    policies = {"mlp": [{"policy": "threshold", "threshold": 2.5}] * 3}
    before = compare(model, batches, policies)
    unused = [[e for e in range(8) if uses[e] == 0] for uses in before.active.uses["mlp"]]
    set_routing(model, "mlp", policies["mlp"])
    with torch.no_grad():
        logits = model(batches[0]["input_ids"]).logits
    size = sum(p.numel() for p in model.parameters())
    share = 0.06
    rare = [
        [e for e in range(8) if uses[e] <= share * before.active.num_tokens]
        for uses in before.active.uses["mlp"]
    ]
    report = remove_unused(model, before.active, 0.0)
    assert report["mlp"] == unused
    with torch.no_grad():
        torch.testing.assert_close(model(batches[0]["input_ids"]).logits, logits)
    report = remove_unused(model, before.active, share)
    assert any(rare)
    removed = [sorted({*a, *b}) for a, b in zip(unused, report["mlp"])]
    assert removed == rare
    assert sum(p.numel() for p in model.parameters()) == size - sum(map(len, rare)) * 3 * 32 * 16


def test_a_share_that_a_family_cannot_give_is_refused():
    """Routers that say nothing: a threshold keeps one expert or all; and uniform K leaves attention experts alone."""
    model = make_model()
    for layer in model.model.layers:
        layer.mlp.router.weight.data.zero_()
    frontier = calibrate(model, draw_batches(model, 32), curve_tokens=600)
    with pytest.raises(UserError, match=r"share of 0\.6 .* global_threshold is (0\.125|1);"):
        frontier.at_share(0.6, "global_threshold")
    model = make_model(**MOA)
    frontier = calibrate(model, draw_batches(model, 32), curve_tokens=600)
    # one MLP expert of eight and all attention experts: 3 * (1536 + 4 * 512) of 3 * (8 * 1536 + 4 * 512)
    with pytest.raises(UserError, match=r"share of 0\.2 .* uniform_k is 0\.25;"):
        frontier.at_share(0.2, "uniform_k")
    assert frontier.at_share(0.3, "uniform_k").share == pytest.approx(0.25)
    assert frontier.at_share(0.2).share == pytest.approx(0.2, abs=0.01)


def test_uniform_k_needs_mlp_experts():
    model = make_model(num_experts=1, **MOA)
    batches = draw_batches(model, 32)
    with pytest.raises(UserError, match="uniform_k sets the K of MLP experts"):
        calibrate(model, batches, family="uniform_k")
    frontier = calibrate(model, batches, curve_tokens=600)
    for ask in (frontier.at_share, frontier.within):
        with pytest.raises(UserError, match="uniform_k sets the K of MLP experts"):
            ask(0.5, "uniform_k")
    assert frontier.at_share(0.5).share == pytest.approx(0.5, abs=0.01)
    frontier.within(0.05)
    assert "uniform_k" not in {one.family for one in frontier.visited}


def test_what_is_above_a_budget_is_not_chosen(dsmoe, monkeypatch):
    frontier = dsmoe[2]
    one = frontier.at_share(0.5)
    best, other = (replace(one.comparison, kl=kl, standard_error=math.inf) for kl in (0.01, 0.02))
    found = {
        "per_layer_threshold": replace(one, share=0.508, comparison=best),
        "uniform_k": replace(one, share=0.5, comparison=other),
        "global_threshold": replace(one, share=0.505, comparison=best),
    }
    monkeypatch.setattr(frontier, "_hit", lambda family, *_: found[family])
    assert frontier.at_share(0.5).share == 0.508
    assert frontier.at_share(0.5, at_most=0.503).share == 0.5
    with pytest.raises(UserError, match=r"per_layer_threshold is 0\.508"):
        frontier.at_share(0.5, "per_layer_threshold", at_most=0.503)
    # any smaller one is within a budget, if nothing is nearer
    found["global_threshold"] = replace(one, share=0.3)
    assert frontier.at_share(0.5, "global_threshold", at_most=0.503).share == 0.3
    with pytest.raises(UserError, match=r"global_threshold is 0\.3"):
        frontier.at_share(0.5, "global_threshold")


def test_removed_experts_break_neither_bound_nor_budget():
    args = SimpleNamespace(
        remove_unused=0.1, max_loss_increase=None, max_flops_per_token=1000.0, target_active=None
    )
    _check_removal(args, Comparison(9.0, 0.0, 9.0, 1.0, 1), 1000.0, 0.2, 0.2)
    with pytest.raises(UserError, match=r"--remove-unused 0\.1 .* 1010 FLOPs .* 1000 of --max-flops"):
        _check_removal(args, Comparison(0.0, 0.0, 0.0, 1.0, 1), 1010.0, 0.2, 0.2)


def test_removed_experts_leave_the_target_as_it_was_asked_for(folder, tmp_path, capsys):
    """Or it is refused: the report must not call a share active that was so before the removal."""
    target = ["--target-active", "0.5", "--remove-unused"]
    assert sparsify(folder, tmp_path / "most", *target, "0.9") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--remove-unused 0.9 shifts the routing" in line and "--target-active is 0.5" in line
    assert not (tmp_path / "most").exists()
    assert sparsify(folder, tmp_path / "few", *target, "0.001") == 0
    report = json.loads((tmp_path / "few" / "sparsity.json").read_text())
    assert abs(report["calibration"]["active_share"] - 0.5) <= 0.01
    # of whole Ks what is below the target is what was asked for
    options = ["--target-active", "0.33", "--family", "uniform_k", "--remove-unused", "0"]
    assert sparsify(folder, tmp_path / "whole", *options) == 0


@pytest.mark.parametrize(
    ("kind", "loss", "hinted"), [("dsmoe", 0.03, True), ("dsmoe", 0.01, False), ("smoe", 0.03, False)]
)
def test_only_a_dear_share_of_a_dsmoe_is_hinted_to_be_trained_for(kind, loss, hinted):
    model = SimpleNamespace(config=SimpleNamespace(kind=kind))
    hint = _hint(model, Comparison(loss, 0.001, 4.0, 1.0, 1))
    assert (hint is not None and "mask_phase" in hint) == hinted


def test_increase_in_nats_or_percent_of_perplexity():
    assert increase("0.005") == 0.005
    assert increase("0.5%") == pytest.approx(0.00498754)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("calibrated")
    words = {f"t{i}": i for i in range(1, VOCAB)} | {"<eos>": 0}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(root / "tokenizer")
    model = make_model(**MOA)
    rows = torch.cat([batch["input_ids"] for batch in draw_batches(model, 96)])
    lines = [json.dumps({"text": " ".join(f"t{i}" for i in row.tolist() if i)}) for row in rows]
    (root / "text.jsonl").write_text("\n".join(lines))
    save_pretrained(model, root / "model", root / "tokenizer")
    return root


def sparsify(folder, output, *args):
    text = [
        "--calibration",
        str(folder / "text.jsonl"),
        "--sequence-length",
        "24",
        "--calibration-tokens",
        "1000",
    ]
    return main(["sparsify", str(folder / "model"), "--output", str(output), *text, *args])


def test_command_writes_what_it_reports(folder, tmp_path):
    output = tmp_path / "sparse"
    flops = 0.8 * inference_flops_per_token(make_model(**MOA).config, 24)
    assert sparsify(folder, output, "--max-flops-per-token", f"{flops}", "--remove-unused", "0.02") == 0
    report = json.loads((output / "sparsity.json").read_text())
    assert 0.97 * flops < report["flops_per_token"] <= flops
    calibration = report["calibration"]
    assert len(calibration["text"]["fingerprint"]) == 64
    assert len(calibration["frontier"]["curves"]) == 6
    assert calibration["frontier"]["visited"]
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.mlp_routing == report["policy"]["mlp"]
    assert report["num_params_total"] == sum(p.numel() for p in model.parameters())
    batches = sample_documents(
        folder / "text.jsonl", PreTrainedTokenizerFast.from_pretrained(output), 1000, 24, 16, 0
    ).batches
    original = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        loss, reference = (
            torch.cat([
                torch.nn.functional.cross_entropy(
                    m(b["input_ids"]).logits.transpose(1, 2), b["shift_labels"], reduction="none"
                )[b["shift_labels"] >= 0]
                for b in batches
            ]).mean()
            for m in (model, original)
        )  # fmt: skip
    assert calibration["loss_increase"] == pytest.approx(float(loss - reference), abs=1e-4)


@pytest.mark.parametrize("family", ["uniform_k", "global_threshold", "per_layer_k"])
def test_no_family_exceeds_the_flops(folder, tmp_path, family):
    flops = 0.75 * inference_flops_per_token(make_model(**MOA).config, 24)
    words = ["--max-flops-per-token", f"{flops}", "--family", family]
    assert sparsify(folder, tmp_path / "sparse", *words) == 0
    report = json.loads((tmp_path / "sparse" / "sparsity.json").read_text())
    assert 0.85 * flops < report["flops_per_token"] <= flops
    assert report["calibration"]["family"] == family


@pytest.mark.parametrize("family", GLOBAL)
def test_one_knob_ranks_by_the_score_that_was_asked_for(folder, tmp_path, capsys, family):
    words = ["--target-active", "0.5", "--family", family]
    written = {}
    for score in ("gate", "gate_norm"):
        assert sparsify(folder, tmp_path / score, *words, "--score", score) == 0
        assert f"(score: {score})" in capsys.readouterr().out
        written[score] = json.loads((tmp_path / score / "sparsity.json").read_text())
        assert written[score]["calibration"]["score"] == score
    for policy in written["gate_norm"]["policy"]["mlp"]:
        assert len(set(policy["score_weights"])) > 1
    assert all("score_weights" not in policy for policy in written["gate"]["policy"]["mlp"])
    losses = [written[score]["calibration"]["loss_increase"] for score in written]
    assert losses[0] != losses[1]


def test_a_model_that_stays_as_it_is_is_said_to_rank_by_nothing(folder, tmp_path, capsys, monkeypatch):
    def reference(frontier, bound, family=None):
        return frontier._measure("reference", frontier.allocation.reference, True)

    monkeypatch.setattr(Frontier, "within", reference)
    assert sparsify(folder, tmp_path / "same", "--max-loss-increase", "0", "--score", "gate_norm") == 0
    assert "keeps all experts" in capsys.readouterr().out
    report = json.loads((tmp_path / "same" / "sparsity.json").read_text())
    assert report["calibration"]["score"] is None


def test_the_seed_is_zero_unless_told_otherwise(folder, tmp_path):
    words = ["--target-active", "0.5", "--family", "uniform_k"]
    texts = []
    for number, seed in enumerate(([], ["--seed", "0"], ["--seed", "1"])):
        assert sparsify(folder, tmp_path / str(number), *words, *seed) == 0
        report = json.loads((tmp_path / str(number) / "sparsity.json").read_text())
        texts.append(report["calibration"]["text"])
    assert texts[0] == texts[1] and texts[0]["seed"] == 0 and texts[2]["seed"] == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["--max-loss-increase", "--policy"]),
        (["--target-active", "0.2", "--family", "uniform_k"], ["uniform_k is 0.25;"]),
        (["--target-active", "0.5", "--max-loss-increase", "0.1"], ["one of"]),
        (["--target-active", "0.01"], ["0.01", "0.1429"]),
        (["--target-active", "0.5", "--k", "3"], ["--k"]),
        (["--policy", "top_k", "--k", "3", "--family", "top_p"], ["--family"]),
        (["--max-flops-per-token", "10"], ["10", "one expert"]),
        (["--max-loss-increase", "-3"], ["best found"]),
    ],
)
def test_bad_requests_get_one_line_and_write_nothing(folder, tmp_path, capsys, args, words):
    assert sparsify(folder, tmp_path / "sparse", *args) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert all(word in error for word in words), error
    assert not (tmp_path / "sparse").exists()


def test_seeds_draw_other_documents(folder):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    texts = [sample_documents(folder / "text.jsonl", tokenizer, 300, 24, 4, seed) for seed in (0, 0, 1)]
    prints = [text.description["fingerprint"] for text in texts]
    assert prints[0] == prints[1] != prints[2]


def test_one_document_gives_no_standard_error(folder, tmp_path, capsys):
    (tmp_path / "one.jsonl").write_text((folder / "text.jsonl").read_text().splitlines()[0])
    words = ["--calibration", str(tmp_path / "one.jsonl"), "--sequence-length", "24"]
    command = ["sparsify", str(folder / "model"), "--output", str(tmp_path / "sparse"), *words]
    assert main([*command, "--max-loss-increase", "5%"]) == 2
    assert "single document" in capsys.readouterr().err
    assert not (tmp_path / "sparse").exists()
    # a share needs none; the report says so in JSON that any reader takes
    assert main([*command, "--target-active", "0.5", "--family", "global_threshold"]) == 0
    assert "single document" in capsys.readouterr().out

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    report = json.loads((tmp_path / "sparse" / "sparsity.json").read_text(), parse_constant=refuse)
    assert report["calibration"]["standard_error"] is None
