"""What polishing did, against the models' own losses."""

import pytest
import torch

from dsmoe.model import use_routing
from dsmoe.report import polish
from dsmoe.report.polish import ALL, measure_rows, table
from dsmoe.sparsify.compare import reference_policies

SPARSE = {"policy": "top_k", "k": 1}


def test_rows_are_differences_of_the_models_losses(tiny_model):
    before, after = tiny_model(), tiny_model()
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.mul_(1.1)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(2):
        tokens = torch.randint(1, 97, (3, 13), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[0, :4] = -100
        batches.append(
            {"input_ids": tokens[:, :-1], "shift_labels": labels, "attention_mask": torch.ones_like(labels)}
        )
    layers = before.config.num_hidden_layers
    policies = {ALL: reference_policies(before), "one": {"mlp": [SPARSE] * layers}}
    rows = measure_rows(before, after, batches, policies)

    def loss(model, policy):
        with torch.no_grad(), use_routing(model, mlp=policy):
            sums = [
                torch.nn.functional.cross_entropy(
                    model(batch["input_ids"]).logits.flatten(0, 1).double(),
                    batch["shift_labels"].flatten(),
                    reduction="sum",
                )
                for batch in batches
            ]
        return float(sum(sums)) / sum(int((batch["shift_labels"] >= 0).sum()) for batch in batches)

    dense = {"policy": "dense"}
    reference, sparse, polished = loss(before, dense), loss(before, SPARSE), loss(after, SPARSE)
    one = rows[1]
    assert one["increase_before"] == pytest.approx(sparse - reference, abs=1e-5)
    assert one["increase_after"] == pytest.approx(polished - reference, abs=1e-5)
    assert one["change"] == pytest.approx(polished - sparse, abs=1e-5) and one["standard_error"] > 0
    assert one["active_before"] == pytest.approx(1 / before.config.num_experts)
    assert (
        rows[0]["loss_after"] == pytest.approx(loss(after, dense), abs=1e-5) and rows[0]["recovered"] is None
    )
    shown = table({"rows": rows, "text": {"num_tokens": 68, "split": "test"}})
    assert f"{one['loss_after']:.4f}" in shown and ALL in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--record", "parent", "--overwrite"], "is no record"),
        (["--record", "new", "--conclusion", "missing.md"], "--conclusion missing.md: can't be read"),
        (["--json", "parent"], "--json parent: is a folder"),
    ],
)
def test_outputs_are_tried_before_anything_is_read(tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parent" / "record").mkdir(parents=True)
    # there is no model and no text here
    assert polish.main(["runs/dsmoe", "--polished", "runs/polished", "--data", "x", *options]) == 2
    assert words in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["parent"]
