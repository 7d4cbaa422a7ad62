"""The training benchmark: what it measures is measured rightly, and its results have the promised form."""

import json
import math
import os
import statistics

import pytest
import torch

from dsmoe import DSMoEConfig, DSMoEForCausalLM
from dsmoe.bench import command, training
from dsmoe.bench.contestants import DenseSwiGLU, layer_steps
from dsmoe.bench.memory import peak_bytes, saved_bytes
from dsmoe.bench.tables import growth_plot, result_table
from dsmoe.bench.timing import interleaved_seconds, ratio, threads_in_use


def test_contestants_take_turns():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = interleaved_seconds(steps, 4, {"c": 2}, lambda: calls.append("."))
    # one round of warming up, and c stops after two counted ones
    assert "".join(calls) == "a.b.c." * 3 + "a.b." * 2
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4, "c": 2}
    assert all(value >= 0 for values in seconds.values() for value in values)


def test_ratio_pairs_rounds():
    """A slow round of the machine meets both: the ratio of medians would be off, the median of ratios isn't."""
    found = ratio([2.0, 20.0, 2.0, 4.0], [1.0, 10.0, 1.0])
    assert found == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert ratio([3.0], [2.0])["median"] == 1.5
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert ratio(values, [1.0] * 5) == {"median": 3.0, "low": 2.0, "high": 4.0}


def test_threads_are_put_back():
    before = torch.get_num_threads()
    allowed = os.sched_getaffinity(0)
    with threads_in_use(1) as cores:
        assert torch.get_num_threads() == 1
        assert os.sched_getaffinity(0) == set(cores)
        assert len(cores) == 1
    assert torch.get_num_threads() == before
    assert os.sched_getaffinity(0) == allowed


@pytest.mark.parametrize("autocast", [False, True])
def test_saved_bytes_of_a_dense_layer_by_hand(autocast):
    """x, gate, up, silu(gate) and their product; no weight, and no cast of one."""
    layer, x = DenseSwiGLU(8, 12), torch.randn(5, 8, requires_grad=True)

    def forward():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return layer(x)

    found = saved_bytes(forward, layer.parameters())
    assert found == (2 if autocast else 4) * (5 * 8 + 4 * 5 * 12)


def test_saved_bytes_knows_casts_of_stacked_weights():
    """Used as one wide matrix, under autocast: only the cast of x counts."""
    weight, x = torch.randn(3, 4, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)

    def forward():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ weight.flatten(0, 1).T

    assert saved_bytes(forward, [weight]) == 2 * 5 * 8


def test_saved_bytes_counts_a_storage_once():
    x = torch.randn(6, 4, requires_grad=True)
    assert saved_bytes(lambda: (x * x).sum() + (x.T * x.T).sum(), []) == 6 * 4 * 4


def test_peak_bytes_sees_a_large_temporary():
    found = peak_bytes(lambda: torch.ones(64 << 18).sum())
    if found is None:
        pytest.skip("no /proc here")
    assert 60 << 20 < found < 200 << 20


def test_contestants_compute_the_same():
    """With equal weights, all layers give one result: the comparison is of one computation."""
    steps = layer_steps((16, 4, 8), 10, torch.float32, ("eager", "batched_mm", "grouped_mm"))
    wide = steps["wide"].layer
    for name in ("recompute", "eager", "batched_mm", "grouped_mm"):
        layer = steps[name].layer
        target = getattr(layer, "experts", None)
        with torch.no_grad():
            layer.gates.copy_(wide.gates)
            if target is None:
                layer.up.copy_(wide.up)
                layer.down.copy_(wide.down)
            else:
                target.gate_up_proj.copy_(wide.up)
                target.down_proj.copy_(wide.down.transpose(1, 2))
        torch.testing.assert_close(steps[name].forward(), steps["wide"].forward(), rtol=1e-4, atol=1e-5)
    dense = steps["dense"].layer
    with torch.no_grad():
        wide.gates.fill_(1.0)
        dense.gate_proj.weight.copy_(wide.up[:, :8].flatten(0, 1))
        dense.up_proj.weight.copy_(wide.up[:, 8:].flatten(0, 1))
        dense.down_proj.weight.copy_(wide.down.flatten(0, 1).T)
    torch.testing.assert_close(steps["dense"].forward(), steps["wide"].forward(), rtol=1e-4, atol=1e-5)


def test_a_step_leaves_fresh_gradients():
    for step in layer_steps((8, 2, 4), 6, torch.float32, ("eager",)).values():
        step()
        first = step.x.grad.clone()
        step()
        assert torch.equal(step.x.grad, first)
        assert all(p.grad is not None for p in step.parameters())


def test_full_plan_is_what_the_claims_are_about():
    assert set(training.FULL.layers) == {(512, 32, 64), (512, 8, 256), (1024, 32, 128)}
    assert training.FULL.tokens == 2048
    assert training.FULL.rounds >= 15
    config = DSMoEConfig(**training.MODEL)
    with torch.device("meta"):
        model = DSMoEForCausalLM(config)
    assert 37e6 < sum(parameter.numel() for parameter in model.parameters()) < 39e6


def test_quick_run_writes_the_promised_form(capsys, tmp_path):
    before = torch.backends.mkldnn.matmul.fp32_precision
    arguments = ["--quick", "--rounds", "2", "--threads", "1", "--plot", str(tmp_path / "growth.png")]
    assert command.main([*arguments, "--json", "-"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    cases = {(row["case"], row["dtype"], row["recompute"]) for row in results["layers"]}
    assert len(cases) == len(results["layers"]) == 2 * 2 * 2
    for row in results["layers"]:
        assert isinstance(row["num_experts"], int)
        assert row["time_ratio_to_dense"] == pytest.approx(
            statistics.median(a / b for a, b in zip(row["seconds"], row["seconds_dense"]))
        )
        assert row["saved_ratio_to_dense"] == row["saved_bytes"] / row["saved_bytes_dense"]
        compared = row["num_experts"] == 32
        assert (row["speedup_over_transformers"] is not None) == compared
        assert (row["saved_ratio_to_transformers"] is not None) == compared
    assert math.isfinite(results["model"]["tokens_per_second_ratio_to_dense"])
    assert set(results["growth"]) == {"experts", "width", "layers", "sequence"}
    assert {"versions", "hardware"} <= set(results)
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    table = result_table(results)
    assert table.count("\n| d32") == 8
    growth_plot(results["growth"], tmp_path / "again.png")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--threads", "1000"], "--threads has 1000"), (["--rounds", "0"], "--rounds is 0")],
)
def test_bad_arguments_are_told(arguments, message, capsys):
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_record_from_earlier_results(capsys, tmp_path):
    quick = ["--quick", "--rounds", "1", "--threads", "1"]
    results = tmp_path / "results.json"
    assert command.main([*quick, "--json", str(results)]) == 0
    record = ["--results", str(results), "--record", str(tmp_path / "record"), "--note", "A note."]
    assert command.main(record) == 0
    text = (tmp_path / "record" / "README.md").read_text()
    assert "A note." in text and "--threads 1" in text
    assert json.loads((tmp_path / "record" / "results.json").read_text()) == json.loads(results.read_text())
    assert command.main(record) == 2
    assert "--overwrite" in capsys.readouterr().err
