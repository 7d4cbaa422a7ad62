"""The inference benchmark: what it compares is comparable, and its results have the promised form."""

import json
import statistics

import pytest
import torch

from dsmoe import DSMoEConfig, DSMoEForCausalLM
from dsmoe.bench import inference, inference_command, inference_model
from dsmoe.bench.ceiling import gemm_flops_per_second, read_bytes_per_second
from dsmoe.bench.inference_contestants import IMPLEMENTATIONS, batches, layer_steps, layer_weights
from dsmoe.bench.inference_tables import goal, result_table
from dsmoe.bench.timing import interleaved_seconds

SIZES = (32, 8, 8)


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return layer_weights(SIZES, torch.float32, cold_bytes=1 << 18)


def test_contestants_compute_the_same(weights):
    (given,) = batches(weights, tokens=5, k=3, count=1)
    given.threshold = given.top_k
    steps = layer_steps(weights, [given], IMPLEMENTATIONS)
    with torch.inference_mode():
        expected = steps.pop("top_k")()
        for name in ("threshold", *IMPLEMENTATIONS):
            torch.testing.assert_close(steps[name](), expected, rtol=1e-4, atol=1e-5)
        given.gates = torch.ones_like(given.gates)
        torch.testing.assert_close(steps["all_experts"](), steps["dense"](), rtol=1e-4, atol=1e-5)


def test_weights_and_batches_turn(weights, monkeypatch):
    used = []
    monkeypatch.setattr(
        "dsmoe.bench.inference_contestants.grouped_experts",
        lambda x, gates, mask, up, down, mlp_type: used.append((up.data_ptr(), x.data_ptr())),
    )
    copies = len(weights.own)
    assert copies * sum(t.nbytes for t in weights.own[0]) >= 1 << 18
    given = batches(weights, tokens=1, k=2, count=3)
    steps = layer_steps(weights, given, ())
    for _ in range(copies):
        steps["top_k"]()
    assert [up for up, _ in used] == [up.data_ptr() for up, _ in weights.own]
    assert [x for _, x in used[:4]] == [given[i % 3].x.data_ptr() for i in range(4)]
    used.clear()
    steps["threshold"]()
    assert used[0][0] == weights.own[copies // 3][0].data_ptr(), "another copy than top-K's at the same time"


def test_steps_in_a_row_are_timed_as_one(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("dsmoe.bench.timing.time.perf_counter", lambda: next(clock))
    calls = []
    steps = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = interleaved_seconds(steps, 2, in_a_row=4)
    assert "".join(calls) == ("aaaa" + "bbbb") * 3
    assert seconds == {"a": [0.25] * 2, "b": [0.25] * 2}, "seconds of one step, the first round not counted"


@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (1, 4), (8, 2), (64, 3)])
def test_threshold_keeps_as_many_as_top_k_in_the_mean(weights, tokens, k):
    given = batches(weights, tokens, k, count=20)
    counts = torch.cat([batch.threshold.sum(-1) for batch in given])
    assert counts.sum() == k * counts.numel() and counts.min() >= 1
    assert all((batch.top_k.sum(-1) == k).all() for batch in given)
    for batch in given:
        assert torch.equal(batch.gates.gather(1, batch.index), batch.weights)
        assert batch.top_k.gather(1, batch.index).all()


def test_shuffled_turns():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = interleaved_seconds(steps, 9, shuffle=True)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, 30, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds) and len(set(rounds)) > 2
    assert list(seconds) == ["a", "b", "c"] and all(len(values) == 9 for values in seconds.values())


def test_ceilings_are_rates():
    assert 1e8 < read_bytes_per_second(1 << 22, 1) < 1e12
    assert 1e7 < gemm_flops_per_second(8, 64, 64, torch.float32, 2, ("forward", "input")) < 1e14


def test_full_plan_is_what_the_claims_are_about():
    plan = inference.FULL
    assert set(plan.layers) == {(512, 32, 64), (1024, 32, 128)}
    assert plan.kept == (4, 8) and plan.batches == (1, 8) and plan.prefill_tokens == 1024
    row = {"dtype": "f32", "policy": "top_k", "k": 4, "num_experts": 32}
    decode = {**row, "phase": "decode", "batch": 1}
    assert goal({**decode, "active_bytes": 6_000_000}) == pytest.approx((1.15 / 8, 5))
    assert goal({**decode, "active_bytes": 1_000_000, "dtype": "bf16"}) == pytest.approx((1.4 / 8, 8))
    assert goal({**decode, "batch": 8}) == pytest.approx((0.66, 2.5))
    assert goal({**row, "phase": "prefill"}) == pytest.approx((1.5 / 8, 2.2))
    assert goal({**row, "phase": "prefill", "dtype": "bf16"}) == pytest.approx((2.0 / 8, 2.2))
    assert goal({**row, "phase": "prefill", "dtype": "bf16", "k": 8}) == pytest.approx((1.5 / 4, 2.2))


def check_model(model):
    config = DSMoEConfig(**model["sizes"], num_experts=8)
    assert model["num_params_total"] == sum(p.numel() for p in DSMoEForCausalLM(config).parameters())
    assert model["num_params_total"] - model["num_params_active"] == 2 * 3 * 32 * 128 * 3 // 4
    rows = model["rows"]
    assert [row["dtype"] for row in rows] == ["f32", "bf16", "int8"]
    assert model["tokens_per_second_ratio_to_dense"] == min(
        row["tokens_per_second_ratio_to_dense"] for row in rows[:2]
    )
    for row in rows:
        seconds = row["seconds"]
        assert row["tokens_per_second_ratio_to_dense"] == pytest.approx(
            statistics.median(a / b for a, b in zip(seconds["dense"], seconds["own"]))
        )
        assert 1 < row["ideal_ratio_to_dense"] < 4 and 0.5 < row["experts_used_by_prompt"] <= 1
        assert row["own"]["cache_bytes"] == row["dense"]["cache_bytes"]
        changed = [(step["k"], step["batch"], step["context"]) for step in row["growth"]]
        expected = [(2, 1, 8), (1, 1, 8), (4, 1, 8), (8, 1, 8), (2, 2, 8), (2, 4, 8), (2, 8, 8), (2, 1, 32)]
        assert changed == ([] if row["dtype"] == "int8" else expected)
        assert (row["speedup_over_transformers"] is None) == (row["dtype"] == "int8")
    assert (
        rows[0]["own"]["weight_bytes"] == 4 * model["num_params_total"] == 2 * rows[1]["own"]["weight_bytes"]
    )
    assert rows[0]["own"]["bytes_read_per_token"] == 4 * model["num_params_active"]


def test_the_model_is_what_the_claim_is_about():
    case = inference.FULL.model
    with torch.device("meta"):
        total = inference_model.model_summary(
            case, [{"dtype": "f32", "tokens_per_second_ratio_to_dense": 1.0}]
        )
    assert total["num_params_total"] >= 100_000_000 and total["mlp_share_active"] <= 1 / 3


def test_transformers_loop_is_theirs(monkeypatch):
    case = inference.QUICK.model
    model = inference_model._model(case, "f32", "own")
    monkeypatch.setattr(DSMoEForCausalLM, "_sample", None)
    inference_model._transformers_generate(model, torch.tensor([[1, 2, 3]]), 2)


def test_only_the_model(capsys):
    assert inference_command.main(["--quick", "--threads", "1", "--only", "model", "--json", "-"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["layers"] == [] and results["model"]["tokens_per_second_ratio_to_dense"] > 0
    assert "| layer |" not in result_table(results)


def test_quick_run_writes_the_promised_form(capsys, tmp_path):
    before = torch.backends.mkldnn.matmul.fp32_precision
    record = tmp_path / "record"
    arguments = ["--quick", "--threads", "1", "--json", "-", "--record", str(record)]
    assert inference_command.main(arguments) == 0
    results = json.loads(capsys.readouterr().out)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert len(results["layers"]) == 3 * 3 * 2  # dtypes; batch 1, batch 8, prefill; policies
    keys = {
        (row["case"], row["dtype"], row["phase"], row["batch"], row["policy"]) for row in results["layers"]
    }
    assert len(keys) == len(results["layers"])
    assert {row["dtype"] for row in results["layers"]} == {"f32", "bf16", "int8"}
    for row in results["layers"]:
        seconds = row["seconds"]
        assert row["time_ratio_to_all_experts"] == pytest.approx(
            statistics.median(a / b for a, b in zip(seconds[row["policy"]], seconds["all_experts"]))
        )
        all_bytes = 3 * 32 * 8 * 8 * {"f32": 4, "bf16": 2, "int8": 1}[row["dtype"]]
        assert 0 < row["active_bytes"] <= all_bytes and 0 < row["ideal_ratio"] <= 1
        if row["phase"] == "decode":
            assert row["ideal_ratio"] == pytest.approx(row["active_bytes"] / all_bytes, rel=1e-2)
            assert row["share_of_read_bandwidth"] > 0
        else:
            assert row["ideal_ratio"] == pytest.approx(row["k"] / 8)
            assert row["share_of_gemm_ceiling"] > 0
        assert row["speedup_over_transformers"] > 0
    check_model(results["model"])
    assert {"versions", "hardware"} <= set(results)
    assert result_table(results).count("\n| d32") == 18
    assert result_table(results).count("attention projections") == 3
    assert json.loads((record / "results.json").read_text(encoding="utf-8")) == results
    assert "| d32 N8 F8 K2 f32 | decode" in (record / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "1000"], "--threads has 1000"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--record", "."], "the current folder"),
    ],
)
def test_bad_arguments_are_told(arguments, message, capsys):
    assert inference_command.main(["--quick", *arguments]) == 2
    assert message in capsys.readouterr().err
