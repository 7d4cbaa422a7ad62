"""Validation loss: against a sum over positions in float64, whatever the batching and chunking."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsmoe.evaluation import perplexity


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.5,
            attention_dropout=0.5,
        )
    )


def batch_of(rows, length, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 40, (rows, length + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[-1, length // 2 :] = -100
    mask = torch.ones_like(labels)
    mask[-1, length // 2 :] = 0
    return {"input_ids": tokens[:, :-1].clone(), "shift_labels": labels, "attention_mask": mask}


def naive(model, batches):
    total, count = 0.0, 0
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            kept = batch["shift_labels"][row] != -100
            length = int(kept.sum())
            with torch.no_grad():
                logits = model(batch["input_ids"][row : row + 1, :length]).logits[0].double()
            for position in range(length):
                label = batch["shift_labels"][row, position]
                total -= torch.log_softmax(logits[position], -1)[label].item()
                count += 1
    return total / count, count


def test_equals_a_loop_over_positions(model):
    batches = [batch_of(3, 9, 1), batch_of(2, 6, 2)]
    loss, count = naive(model.eval(), batches)
    model.train()  # with dropout: the function has to switch it off, and back on
    found = perplexity.validation_loss(model, batches, bytes_per_token=4.5)
    assert model.training
    assert found["num_tokens"] == count
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(loss / math.log(2) / 4.5, rel=1e-6)


def test_chunks_do_not_matter(monkeypatch):
    logits = torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    labels = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(4))
    labels[0] = -100
    whole = perplexity.summed_cross_entropy(logits, labels)
    monkeypatch.setattr(perplexity, "_CHUNK_ENTRIES", 30)  # two positions at a time
    parts = perplexity.summed_cross_entropy(logits, labels)
    assert whole[1] == parts[1] == 14
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)


def test_nothing_to_predict(model):
    batch = batch_of(1, 4, 0)
    batch["shift_labels"][:] = -100
    found = perplexity.validation_loss(model, [batch], bytes_per_token=4.0)
    assert found == {"loss": None, "num_tokens": 0, "bits_per_byte": None}


def test_without_bytes(model):
    assert perplexity.validation_loss(model, [batch_of(1, 4, 0)])["bits_per_byte"] is None
