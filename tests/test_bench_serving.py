"""The serving benchmark: budgets, rows and tables; engines that work, fail, fall silent; two real ones on tiny models."""

import json
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsmoe.accounting import count_parameters, kv_cache_bytes
from dsmoe.bench import serving_command, serving_process
from dsmoe.bench.serving_child import prompts_of
from dsmoe.bench.serving_extra import extra_form, kind_of, parse_extras
from dsmoe.bench.serving_models import FULL_SHAPE, QUICK_SHAPE, Form, config_of, form_of, native_folder
from dsmoe.bench.serving_rounds import Conditions, Model, measure_group
from dsmoe.bench.serving_rows import MEASURED, percentile, row_of
from dsmoe.bench.serving_settings import Setting, kv_tokens
from dsmoe.bench.serving_tables import draw, result_table
from dsmoe.checkpoint.pretrained import save_pretrained
from dsmoe.errors import UserError
from dsmoe.files import read_json
from dsmoe.model import DSMoEForCausalLM

PROMISED = {"model", "kind", "engine", "setting", *MEASURED}
SETTING = Setting("requests", 4, 3, 2, 2)
CONDITIONS = Conditions(memory_bytes=2000, dtype="bfloat16", threads=1, cores=[], rounds=3, timeout=20)
# a child that answers by its job's source: seconds of a token, or how it fails; it loads nothing
STUB = """
import json, sys
def say(**value): print(json.dumps(value), flush=True)
job = json.loads(sys.stdin.readline())
if job["source"] == "absent": say(error="ModuleNotFoundError: No module named 'llama_cpp'"); sys.exit(1)
if job["source"] == "crash": print("first\\nlast words", file=sys.stderr); sys.exit(7)
if job["source"] == "silent": sys.stdin.read()
say(ready=True, library_memory_bytes=5, load_peak_bytes=70)
count = 0
for line in sys.stdin:
    order, count = json.loads(line), count + 1
    if job["source"] == "late" and count > 2: say(error="RuntimeError: no more"); break
    step = float(job["source"].split()[-1]) if job["source"][0] == "0" else 1.0
    first = 2 * step
    last = first + step * (order["output_tokens"] - 1)
    n = order["requests"]
    say(first=[first] * n, last=[last] * n, serving_peak_bytes=60 + count, engine_version="1", options=job)
"""


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(serving_process, "command_of", lambda python: [sys.executable, "-S", "-c", STUB])


def model(name, source, **fields):
    numbers = {
        "model_bytes": 1000,
        "kv_bytes_per_token": 10,
        "num_params_total": 500,
        "num_params_active": 200,
    }
    return Model(name, "dense" if name == "dense" else "dsmoe", lambda engine: Form(
        source=source, native=True, vocab_size=9, **{**numbers, **fields}))  # fmt: skip


@given(st.integers(0, 10**10), st.integers(1, 10**10), st.integers(1, 10**5))
def test_cache_and_weights_fill_the_budget(memory, weights, per_token):
    tokens = kv_tokens(memory, weights, per_token)
    assert tokens >= 0
    assert tokens == 0 or weights + tokens * per_token <= memory
    assert weights + (tokens + 1) * per_token > memory


def test_budget_limits_the_requests_at_a_time():
    setting = Setting("requests", 10, 6, 8, 8)
    assert setting.within(1000).concurrency == 8
    assert setting.within(16 * 3 + 15).concurrency == 3
    with pytest.raises(UserError, match=r"room for 15 tokens, and one request has 16; raise --memory"):
        setting.within(15)
    with pytest.raises(UserError, match="requests is 0"):
        Setting("requests", 1, 2, 0, 1)


def test_shapes_are_comparable():
    dense, smoe, dsmoe = (
        count_parameters(config_of(FULL_SHAPE, kind)) for kind in ("dense", "smoe", "dsmoe")
    )
    assert dense.total > 100e6 and dsmoe.total == dense.total + dsmoe.router
    assert dsmoe.router < 0.002 * dense.total
    assert 2.45 < smoe.total / dense.total < 2.55
    assert dsmoe.mlp_active_fraction == 0.25
    assert smoe.active - smoe.router == dsmoe.active - dsmoe.router


@pytest.mark.parametrize("kind", ["dense", "dsmoe"])
def test_native_form(kind, tmp_path):
    folder = native_folder(QUICK_SHAPE, kind, "bfloat16", tmp_path)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert native_folder(QUICK_SHAPE, kind, "bfloat16", tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp, "made once"
    form = form_of(folder, "own", "bfloat16", tmp_path)
    loaded = DSMoEForCausalLM.from_pretrained(folder)
    assert form.num_params_total == sum(p.numel() for p in loaded.parameters())
    assert form.native and form.source == str(folder)
    assert form.kv_bytes_per_token == kv_cache_bytes(loaded.config, 1)
    assert form.model_bytes == 2 * form.num_params_total
    assert kind_of(str(folder)) == kind


def test_stock_form_is_an_extra_as_well(tmp_path):
    folder = native_folder(QUICK_SHAPE, "dsmoe", "bfloat16", tmp_path)
    stock = form_of(folder, "transformers", "bfloat16", tmp_path)
    assert not stock.native and stock.num_params_active < stock.num_params_total
    extra = extra_form(stock.source, "vllm", "bfloat16", tmp_path)
    shared = 2 * (3 * 64 + 64)  # Qwen2-MoE's shared expert of width 1 and its gate, in two layers
    biases = 2 * 0
    assert extra.num_params_total == stock.num_params_total + shared + biases
    assert extra.num_params_active == stock.num_params_active + shared + biases
    assert extra.kv_bytes_per_token == stock.kv_bytes_per_token
    assert kind_of(stock.source) == "extra"
    with pytest.raises(UserError, match="own needs a dsmoe folder"):
        extra_form(stock.source, "own", "bfloat16", tmp_path)
    gguf = pytest.importorskip("gguf") and form_of(folder, "llamacpp", "bfloat16", tmp_path)
    read = extra_form(gguf.source, "llamacpp", "bfloat16", tmp_path)
    assert (read.kv_bytes_per_token, read.vocab_size) == (gguf.kv_bytes_per_token, gguf.vocab_size)
    assert read.num_params_total - read.num_params_active == stock.num_params_total - stock.num_params_active


def test_extras_are_named():
    assert parse_extras(["a=x/y", "b=C=D"]) == {"a": "x/y", "b": "C=D"}
    for bad in ("x/y", "=x", "dense=x"):
        with pytest.raises(UserError, match="--extra"):
            parse_extras([bad])


def test_prompts_are_the_same_for_all():
    order = {"requests": 3, "input_tokens": 5, "output_tokens": 1, "seed": 4}
    prompts = prompts_of(order, 7)
    assert prompts == prompts_of({**order, "output_tokens": 9}, 7) != prompts_of({**order, "seed": 5}, 7)
    assert [len(p) for p in prompts] == [5, 5, 5] and all(0 <= token < 7 for p in prompts for token in p)


def test_prompts_of_one_token_in_waves():
    """Four waves of two requests, five tokens each, a second a step: two tokens a second."""
    answer = {
        "first": [1, 1, 6, 6, 11, 11, 16, 16],
        "last": [5, 5, 10, 10, 15, 15, 20, 20],
        "serving_peak_bytes": None,
        "engine_version": "1",
        "options": {},
    }
    setting = {"name": "s", "requests": 8, "input_tokens": 1, "output_tokens": 5, "concurrency": 2}
    rounds = [{"full": answer, "first_tokens": None}]
    row = row_of("dense", "dense", "own", setting, {}, {"load_peak_bytes": None}, rounds)
    assert row["decode_tokens_per_second"] == row["tokens_per_second"] == 2.0
    assert row["prefill_tokens_per_second"] is None


def test_row_of_known_times():
    def answer(first, last, peak):
        return {
            "first": first,
            "last": last,
            "serving_peak_bytes": peak,
            "engine_version": "1",
            "options": {},
        }

    rounds = [
        {"full": answer([1.0, 2.0], [3.0, 4.0], 80), "first_tokens": answer([0.5, 1.0], [0.5, 1.0], 80)},
        {"full": answer([1.0, 2.0], [3.0, 5.0], 90), "first_tokens": answer([0.5, 1.0], [0.5, 1.0], 90)},
    ]
    setting = {"name": "requests", "input_tokens": 10, "output_tokens": 7, "requests": 2, "concurrency": 2}
    numbers = {"num_params_total": 1, "num_params_active": 1, "model_memory_bytes": 1, "kv_tokens": 1}
    row = row_of("dense", "dense", "own", setting, numbers, {"load_peak_bytes": 100}, rounds)
    assert set(row) >= PROMISED
    assert row["tokens_per_second_by_round"] == [14 / 4, 14 / 5]
    assert row["requests_per_second"] == pytest.approx(2 / 4.5)
    assert row["prefill_tokens_per_second"] == 20 / 1.0
    assert row["decode_tokens_per_second"] == pytest.approx((12 / 3 + 12 / 4) / 2)
    assert (row["latency_p50_seconds"], row["latency_p95_seconds"]) == (3.0, 5.0)
    assert row["time_to_first_token_p50_seconds"] == 1.0
    assert (row["peak_memory_bytes"], row["serving_peak_memory_bytes"]) == (100, 90)


@given(st.lists(st.floats(0, 9), min_size=1, max_size=30), st.floats(0.01, 1))
def test_percentile(values, share):
    found = percentile(sorted(values), share)
    count = len(values)
    assert sum(value <= found for value in values) >= share * count - 1e-6
    assert sum(value < found for value in values) < share * count + 1e-6


def test_rows_and_ratios_of_engines_that_answer(stub):
    steps = []
    models = [model("dense", "0 0.5"), model("dsmoe", "0 0.25")]
    dense, dsmoe = measure_group(models, "own", SETTING, CONDITIONS, steps.append, pytest.fail)
    assert len(steps) == 2 * (1 + CONDITIONS.rounds)
    assert set(dense) >= PROMISED and "error" not in dense
    assert dense["tokens_per_second"] == pytest.approx(2 * 3 / (0.5 * 4))
    assert dsmoe["tokens_per_second_ratio_to_dense"]["median"] == pytest.approx(2.0)
    assert dense["prefill_tokens_per_second"] == pytest.approx(2 * 4 / 1.0)
    assert dense["decode_tokens_per_second"] == pytest.approx(2 * 2 / 1.0)
    assert dense["kv_tokens"] == 100 and dense["options"]["kv_bytes"] == 1000
    assert dense["peak_memory_bytes"] == 70 and dense["library_memory_bytes"] == 5


def test_failures_leave_the_others_alone(stub):
    told = []
    models = [
        model("dense", "0 0.5"), model("a", "absent"), model("b", "crash"), model("c", "silent"), model("d", "late"),
        model("e", "0 1", model_bytes=3000),
    ]  # fmt: skip
    conditions = Conditions(**{**vars(CONDITIONS), "timeout": 3.0})
    rows = measure_group(models, "llamacpp", SETTING, conditions, lambda case: None, told.append)
    errors = {row["model"]: row.get("error") for row in rows}
    assert errors["dense"] is None and rows[0]["tokens_per_second"] > 0
    assert "llama_cpp is not installed" in errors["a"] and "--python" in errors["a"]
    assert errors["b"].endswith("status 7: last words")
    assert errors["c"] == "no answer within 3 s"
    assert errors["d"] == "RuntimeError: no more"
    assert "raise --memory" in errors["e"]
    assert len(told) == 5 and all("\n" not in line for line in told)
    assert all(set(row) >= PROMISED and row["tokens_per_second"] is None for row in rows[1:])


def test_interpreter_that_is_not_there(monkeypatch):
    monkeypatch.setattr(serving_process, "command_of", lambda python: ["/no/such/python"])
    (row,) = measure_group(
        [model("dense", "0 1")], "own", SETTING, CONDITIONS, lambda case: None, lambda line: None
    )
    assert "can't be started" in row["error"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--rounds", "0"], "--rounds is 0"),
        (["--threads", "99999"], "--threads has 99999"),
        (["--memory", "3"], "--memory"),
        (["--models"], "nothing to measure"),
        (["--output-tokens", "1"], "output_tokens is 1"),
        (["--input-tokens", "60"], "input and output tokens are 66"),
        (["--extra", "x"], "--extra 'x'"),
    ],
)
def test_bad_arguments(words, text, capsys, tmp_path):
    status = serving_command.main(["--quick", "--cache", str(tmp_path), *words])
    assert status == 2 and text in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_real_engines(tmp_path, capsys):
    """Own and transformers on tiny models, in processes of their own; then a record of both runs."""
    common = ["--quick", "--threads", "1", "--rounds", "1", "--cache", str(tmp_path / "cache"), "--json"]
    runs = [
        ["--engines", "own", "--settings", "requests", "--models", "dense", "dsmoe"],
        ["--engines", "transformers", "--settings", "decode", "--models", "dsmoe"],
    ]
    files = [str(tmp_path / "one.json"), str(tmp_path / "two.json")]
    for words, file in zip(runs, files):
        assert serving_command.main([*common, file, *words]) == 0
    capsys.readouterr()
    words = ["--results", *files, "--record", str(tmp_path / "record"), "--json", "-"]
    assert serving_command.main(words) == 0
    results = json.loads(capsys.readouterr().out)
    assert [(row["engine"], row["setting"], row["model"]) for row in results["rows"]] == [
        ("own", "requests", "dense"), ("own", "requests", "dsmoe"), ("transformers", "decode", "dsmoe"),
    ]  # fmt: skip
    for row in results["rows"]:
        assert set(row) >= PROMISED, row
        assert "error" not in row, row
        assert row["tokens_per_second"] > 0 and row["kv_tokens"] > 0
        assert (
            row["peak_memory_bytes"] is None or row["peak_memory_bytes"] >= row["library_memory_bytes"] > 1e7
        )
    assert results["rows"][0]["setting_numbers"]["concurrency"] == 2
    assert {"results.json", "serving.png", "README.md"} <= {
        path.name for path in (tmp_path / "record").iterdir()
    }
    table = result_table(results)
    assert "| own | dsmoe |" in table and "decode tokens/s" in table
    assert (
        "tokens/s, requests (8 in, 6 out, 4 requests)" in table and "decode (1 in, 6 out, 1 request)" in table
    )
    command = read_json(tmp_path / "record" / "record.json")["command"].splitlines()
    start = "python eval/bench_serving.py --quick --threads 1 --rounds 1 --engines"
    assert command[0] == f"{start} own --settings requests --models dense dsmoe --json piece1.json"
    assert command[2].startswith("python eval/bench_serving.py --results piece1.json piece2.json --record ")


def test_table_and_plot_of_failures(tmp_path, stub):
    rows = measure_group(
        [model("dense", "crash")], "own", SETTING, CONDITIONS, lambda case: None, lambda line: None
    )
    results = {
        "rows": rows, "memory_bytes": 1e9, "dtype": "bfloat16", "threads": 1,
        "rounds": 3,
    }  # fmt: skip
    assert "Failed: own, requests, dense: its process ended with status 7" in result_table(results)
    draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_native_folder_is_counted_as_it_runs(tmp_path, tiny_model):
    """Trained folders are float32; engines load them in the type that was asked for, as they do exported ones."""
    save_pretrained(tiny_model(dtype=torch.float32), tmp_path / "model", None)
    sizes = [
        form_of(tmp_path / "model", "own", dtype, tmp_path, stock=False).model_bytes
        for dtype in ("float32", "bfloat16")
    ]
    assert sizes[0] == 2 * sizes[1]
