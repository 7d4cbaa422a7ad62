"""Losses of each source, beside those of the whole text."""

import json

import pytest
import torch

from dsmoe import DSMoEForCausalLM, cli
from dsmoe.data.corpus import TokenCorpus


@pytest.fixture
def two_sources(tmp_path):
    """A corpus of words, and of numbers, which tell less of each other."""
    draws = torch.Generator().manual_seed(0)
    sources = []
    for name, count in (("words", 300), ("numbers", 120)):
        numbers = torch.randint(10_000, (count, 12), generator=draws).tolist()
        texts = [" ".join(f"{n}" if name == "numbers" else "ab"[n % 2] * 3 for n in row) for row in numbers]
        path = tmp_path / f"{name}.jsonl"
        path.write_text(
            "".join(json.dumps({"text": f"{i}: {t}"}) + "\n" for i, t in enumerate(texts)), "utf-8"
        )
        sources += ["--source", f"{name}={path}"]
    prepared = tmp_path / "data"
    held_out = ["--validation-fraction", "0.1", "--test-fraction", "0.1", "--output", str(prepared)]
    assert cli.main(["data", "prepare", *sources, "--train-tokenizer", "300", *held_out]) == 0
    return prepared


def naive_losses(model, corpus, split, size):
    """(Sum, labels) of each source, one window at a time."""
    found = {}
    for source in corpus.source_names:
        tokens = corpus.stream(source, split).read(0, len(corpus.stream(source, split))).tolist()
        stream, total = [corpus.eos_token_id, *tokens], 0.0
        for start in range(0, len(tokens), size):
            window = torch.tensor(stream[start : start + size + 1])
            with torch.no_grad():
                logits = model(window[None, :-1], use_cache=False).logits[0]
            total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        found[source] = (total, len(tokens))
    return found


def test_each_source_has_its_loss(train, two_sources):
    many = 10**6
    run = train(
        "run",
        data__path=str(two_sources),
        train__total_tokens=4 * 128,
        train__eval_tokens=many,
        train__eval_policy={"policy": "top_k", "k": 1},
    )
    summary = run.summary()
    model = DSMoEForCausalLM.from_pretrained(run.folder / "final", dtype=torch.float64)
    corpus = TokenCorpus(two_sources)
    for policy, mode in (("dense", ""), ("top_k", "_sparse")):
        model.config.mlp_routing = [{"policy": policy, "k": 1}] * 2
        for split in ("validation", "test"):
            naive = naive_losses(model, corpus, split, 16)
            by_source = summary[f"{split}_loss{mode}_by_source"]
            assert list(by_source) == ["words", "numbers"]
            for source, (total, count) in naive.items():
                assert by_source[source] == pytest.approx(total / count, rel=1e-5)
            total, count = (sum(part) for part in zip(*naive.values()))
            assert summary[f"{split}_loss{mode}"] == pytest.approx(total / count, rel=1e-5)
    validated = [line for line in run.log() if "validation_loss" in line]
    assert validated[-1]["validation_loss_by_source"] == summary["validation_loss_by_source"]


def test_a_single_source_is_the_whole(train):
    summary = train("run", train__total_tokens=128).summary()
    assert not [name for name in summary if name.endswith("by_source")]
