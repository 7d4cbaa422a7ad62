"""The benchmark of sparse training: its contestants compute the same, and its results have the promised form."""

import json
import statistics

import pytest
import torch

from dsmoe.bench import sparse_training
from dsmoe.bench.memory import saved_bytes
from dsmoe.bench.sparse_training import main, sparse_steps


def test_contestants_compute_the_same():
    steps = sparse_steps((16, 4, 8), 2, 10, torch.float32)
    kept = steps["kept"].layer
    masks = [next(kept.turns) for _ in range(sparse_training._BATCHES)]  # once round
    assert all((mask.sum(1) == 2).all() for mask in masks) and not torch.equal(masks[0], masks[1])
    expected = steps["kept"].forward()
    for name in sparse_training.PEERS:
        layer = steps[name].layer
        index = next(layer.turns)
        layer.turns = iter([index])
        with torch.no_grad():
            layer.gates.copy_(kept.gates.gather(1, index))
            layer.experts.gate_up_proj.copy_(kept.up)
            layer.experts.down_proj.copy_(kept.down.transpose(1, 2))
        torch.testing.assert_close(steps[name].forward(), expected, rtol=1e-4, atol=1e-5)
    everything = steps["all"].layer
    with torch.no_grad():
        everything.up.copy_(kept.up)
        everything.down.copy_(kept.down)
        everything.gates.copy_(kept.gates * masks[0])
    torch.testing.assert_close(steps["all"].forward(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("kept_experts_alone")
def test_saved_bytes_are_those_of_one_batch():
    steps = sparse_steps((64, 4, 8), 2, 64, torch.float32, ())
    kept = steps["kept"]
    # x, mask, where a token's pairs begin, 128 pairs' places; at most an eighth more rows with token, gate, H = 16
    least = 64 * 64 * 4 + 64 * 4 + 64 * 4 + 128 * 4 + 128 * (8 + 4 + 16 * 4)
    assert least <= saved_bytes(kept.forward, kept.parameters()) <= least + 16 * (8 + 4 + 16 * 4)


def test_quick_run_writes_the_promised_form(capsys, tmp_path):
    words = ["--quick", "--threads", "1", "--record", str(tmp_path / "record"), "--json", "-"]
    before = torch.backends.mkldnn.matmul.fp32_precision
    assert main(words) == 0
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    results = json.loads(capsys.readouterr().out)
    assert [(row["case"], row["num_kept"], row["share"]) for row in results["layers"]] == [
        ("d32 N4 F8", 2, 0.5)
    ] * 2
    for row in results["layers"]:
        for other in ("dense", "all"):
            expected = statistics.median(a / b for a, b in zip(row["seconds"]["kept"], row["seconds"][other]))
            assert row[f"time_ratio_to_{other}"] == pytest.approx(expected)
        assert row["best_transformers_implementation"] in sparse_training.PEERS
        assert 0 < row["saved_ratio_to_transformers"] < 1
    assert {"versions", "hardware"} <= set(results)
    text = (tmp_path / "record" / "README.md").read_text()
    assert text.count("| d32 N4 F8 | 2 | 0.500 |") == 2


def test_bad_rounds_are_told(capsys):
    assert main(["--quick", "--rounds", "0"]) == 2
    assert "--rounds is 0" in capsys.readouterr().err
