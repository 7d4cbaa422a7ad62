"""`eval/score.py`: the results file, resuming it, and the tables."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_data_benchmarks import ROWS
from test_data_loader import write_corpus
from test_evaluation_harness import save_model
from transformers import AutoTokenizer

from dsmoe.data.benchmarks import write_benchmarks
from dsmoe.data.corpus import TokenCorpus
from dsmoe.data.loader import evaluation_batches
from dsmoe.errors import UserError, reason_of
from dsmoe.evaluation import score
from dsmoe.evaluation.comparison import compare
from dsmoe.evaluation.loading import load_model
from dsmoe.evaluation.perplexity import validation_loss
from dsmoe.evaluation.results import ResultsFile, fingerprint, paired
from dsmoe.evaluation.table import acc_norm_note, count, markdown, results_table, task_average

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    import datasets.config

    datasets.config.HF_DATASETS_CACHE, before = str(folder / "cache"), datasets.config.HF_DATASETS_CACHE
    write_benchmarks({task: ROWS[task] for task in ("piqa", "sciq")}, folder / "tasks")
    save_model(folder / "llama", seed=0)
    save_model(folder / "twin", seed=1, kind="dense", num_experts=1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    tokens = tokenizer("Open the jar and drink the water.", add_special_tokens=False)["input_ids"] * 9
    write_corpus(folder / "corpus", {"a": {"validation": tokens}})
    tokenizer.save_pretrained(folder / "corpus" / "tokenizer")
    yield folder
    datasets.config.HF_DATASETS_CACHE = before


def arguments(place, *more):
    common = ["--tasks", "piqa,sciq", "--limit", "3", "--include-path", place / "tasks", "--device", "cpu"]
    return [str(part) for part in [*common, *more]]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_two_models_from_end_to_end(place, capsys):
    output = place / "out" / "results.json"
    models = ["--model", place / "llama", "--model", f"ours={place / 'twin'}"]
    more = ["--data", place / "corpus", "--sequence-length", "32", "--output", output]
    assert score.main(arguments(place, *models, *more)) == 0
    results, questions = read(output), read(place / "out" / "results.questions.json")
    llama, ours = results["models"]
    assert (llama["name"], ours["name"]) == ("llama", "ours")
    assert (llama["kind"], ours["kind"]) == (None, "dense")
    assert results["limit"] == 3 and results["task_versions"] == {"piqa": 1.0, "sciq": 1.0}
    assert results["versions"]["lm_eval"] and results["hardware"]["cores"]
    for model in (llama, ours):
        for task in ("piqa", "sciq"):
            outcomes = questions[model["name"]][task]["acc"]
            assert model["tasks"][task]["acc"] == pytest.approx(outcomes.count("1") / 3)
        mean = sum(scores["acc"] for scores in model["tasks"].values()) / 2
        assert model["average"] == pytest.approx(mean)
    (pair,) = results["paired"]
    expected = compare(questions["llama"], questions["ours"])
    for key in ("piqa", "sciq", "average"):
        assert pair[key]["difference"] == pytest.approx(expected[key].difference)
        assert pair[key]["tie"] is expected[key].tie
    out = capsys.readouterr().out
    assert "| ours " in out and "SciQ (val)" in out and "bits/byte" in out and "llama - ours" in out

    corpus = TokenCorpus(place / "corpus")
    batches = evaluation_batches(corpus, split="validation", sequence_length=32, batch_size=1)
    loss = validation_loss(load_model(place / "twin", device="cpu").model, batches, 4.0)
    assert ours["validation_loss"] == pytest.approx(loss["loss"], rel=1e-6)
    assert ours["bits_per_byte"] == pytest.approx(loss["bits_per_byte"], rel=1e-6)
    assert ours["validation_tokens"] == corpus.num_tokens("validation")


def test_resume_scores_only_what_is_missing(place, monkeypatch, capsys):
    output = place / "resumed.json"
    scored = []
    score_one = score.score_one

    def recorded(name, *rest):
        scored.append(name)
        if name == "broken":
            raise UserError("it broke")
        return score_one(name, *rest)

    monkeypatch.setattr(score, "score_one", recorded)
    first = ["--model", f"a={place / 'llama'}", "--model", f"broken={place / 'llama'}", "--output", output]
    assert score.main(arguments(place, *first)) == 2
    assert [row["name"] for row in read(output)["models"]] == ["a"]  # kept although a later model failed
    second = ["--model", f"a={place / 'llama'}", "--model", f"b={place / 'twin'}", "--output", output]
    assert score.main(arguments(place, *second, "--resume")) == 0
    assert [row["name"] for row in read(output)["models"]] == ["a", "b"]
    assert scored == ["a", "broken", "b"]
    # a model that was written anew is scored anew
    weights = place / "twin" / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    weights.write_bytes(weights.read_bytes()[:-1])
    assert score.main(arguments(place, *second, "--resume")) == 0
    assert scored == ["a", "broken", "b", "b"]
    # results of other settings are not mixed
    capsys.readouterr()
    assert score.main(arguments(place, *second, "--resume", "--batch-size", "2")) == 2
    assert "made with batch_size 8, not 2" in capsys.readouterr().err


def test_a_foreign_tokenizer_gets_no_validation_loss(place, capsys):
    save_model(place / "foreign")
    tokenizer = AutoTokenizer.from_pretrained(place / "foreign")
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(place / "foreign")
    output = place / "foreign.json"
    models = ["--model", place / "foreign", "--tasks", "none", "--data", place / "corpus", "--output", output]
    assert score.main([str(part) for part in models]) == 0
    (row,) = read(output)["models"]
    assert row["validation_loss"] is None and row["average"] is None and row["tasks"] == {}
    assert "another tokenizer" in capsys.readouterr().err


def refused(capsys, place, *more):
    """The one line of a command line that is refused."""
    capsys.readouterr()
    assert (
        score.main([str(part) for part in ["--tasks", "none", "--decode-speed", "--device", "cpu", *more]])
        == 2
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_run_is_scored_by_its_final_model(place, tmp_path):
    run = tmp_path / "pretrain"
    save_model(run / "final", kind="dense", num_experts=1)
    # the trainer's own config.json, which is no model's
    (run / "config.json").write_text('{"name": "dsmoe"}', encoding="utf-8")
    output = tmp_path / "results.json"
    assert score.main(arguments(place, "--model", run, "--output", output)) == 0
    (row,) = read(output)["models"]
    assert (row["name"], row["path"], row["kind"]) == ("pretrain", str(run / "final"), "dense")
    assert row["fingerprint"] == fingerprint(run / "final")


def test_an_output_that_cannot_be_written_is_told_before_scoring(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(score, "score_one", None)
    (tmp_path / "file").write_text("")
    for output, message in (
        (tmp_path / "file" / "o.json", "cannot be written (File exists)"),
        (tmp_path, "is a folder"),
        ("/proc/o.json", "cannot be written"),
    ):
        line = refused(capsys, place, "--model", place / "llama", "--output", output)
        assert str(output) in line and message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize("model", ["llama", "twin"])
@pytest.mark.parametrize("change", ["missing", "cut short", "unexpected"])
def test_weights_that_do_not_fit_are_not_scored(place, tmp_path, capsys, model, change):
    """transformers draws what is missing at random and goes on."""
    folder = tmp_path / "model"
    shutil.copytree(place / model, folder)
    weights = folder / "model.safetensors"
    if change == "cut short":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        tensors = load_file(weights)
        if change == "missing":
            del tensors["model.layers.1.self_attn.q_proj.weight"]
        else:
            tensors["model.layers.2.mlp.router.weight"] = torch.ones(4, 16)
        save_file(tensors, weights, metadata={"format": "pt"})
    output = tmp_path / "results.json"
    if (model, change) == ("llama", "unexpected"):  # as in models with heads for other tasks
        words = ["--model", folder, "--tasks", "none", "--data", place / "corpus", "--output", output]
        assert score.main([str(word) for word in words]) == 0
        return
    line = refused(capsys, place, "--model", folder, "--output", output)
    assert str(folder) in line and not output.exists()
    assert change == "cut short" or f"({change} keys: model.layers." in line


@pytest.mark.parametrize("model", ["llama", "twin"])
def test_a_bad_field_of_the_config_is_named(place, tmp_path, capsys, model):
    folder = tmp_path / "model"
    shutil.copytree(place / model, folder)
    config = {**read(folder / "config.json"), "hidden_size": "big"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    line = refused(capsys, place, "--model", folder, "--output", tmp_path / "results.json")
    assert str(folder) in line and "'hidden_size' expected int, got str (value: 'big')" in line


def test_a_tokenizer_that_is_missing_or_damaged_is_told_to_the_end(place, tmp_path, capsys):
    """The first line of what transformers says ends "from one of:"."""
    folder = tmp_path / "model"
    shutil.copytree(place / "llama", folder)
    (folder / "tokenizer.json").write_text("{")
    line = refused(capsys, place, "--model", folder, "--output", tmp_path / "results.json")
    assert str(folder) in line and "tokenizer can't be read (" in line and not line.endswith(":)")
    (folder / "tokenizer.json").unlink()
    line = refused(capsys, place, "--model", folder, "--output", tmp_path / "results.json")
    assert "tokenizer can't be read (" in line and not line.endswith(":)")
    assert reason_of(ValueError("from one of:\n(1) this\n(2) that")) == "from one of: (1) this (2) that"
    assert (reason_of(ValueError(" broken \nsee there")), reason_of(OSError())) == ("broken", "OSError")


@pytest.mark.parametrize("damaged", [[1], {}, {"settings": {}, "models": [3], "task_versions": {}}])
@pytest.mark.parametrize("name", ["results.json", "results.questions.json"])
def test_only_results_can_be_resumed(tmp_path, damaged, name):
    row = {"name": "a", "path": "x/y", "fingerprint": None, "tasks": {}}
    results = ResultsFile(tmp_path / "results.json", {}, {})
    results.add(row, {"piqa": {"ids": "i", "acc": "1"}}, {})
    assert ResultsFile(results.path, {}, {}, resume=True).has("a", "x/y")
    (tmp_path / name).write_text(json.dumps(damaged), encoding="utf-8")
    if name == results.path.name or damaged == [1]:
        with pytest.raises(UserError, match=r"results\.json: not results of score\.py"):
            ResultsFile(results.path, {}, {}, resume=True)
    else:  # a model without outcomes is not finished
        assert not ResultsFile(results.path, {}, {}, resume=True).has("a", "x/y")


def test_bits_per_byte_of_a_part_of_the_split(place, tmp_path):
    output = tmp_path / "results.json"
    words = ["--model", place / "twin", "--tasks", "none", "--data", place / "corpus", "--data-tokens", 20]
    words += ["--sequence-length", 8]
    assert score.main([str(word) for word in [*words, "--output", output]]) == 0
    (row,) = read(output)["models"]
    tokenizer = AutoTokenizer.from_pretrained(place / "corpus" / "tokenizer")
    corpus = TokenCorpus(place / "corpus")
    length = row["validation_sequence_length"]
    (batch,) = evaluation_batches(
        corpus, split="validation", sequence_length=length, batch_size=9, max_tokens=20
    )
    tokens = batch["shift_labels"][batch["shift_labels"] != -100].tolist()
    num_bytes = sum(map(len, tokenizer.convert_ids_to_tokens(tokens)))
    assert row["validation_tokens"] == len(tokens) < corpus.num_tokens("validation")
    assert num_bytes != 4 * len(tokens)  # 4 is what the whole split claims
    assert row["bits_per_byte"] == pytest.approx(
        len(tokens) * row["validation_loss"] / math.log(2) / num_bytes
    )


def test_names_of_models(tmp_path):
    (tmp_path / "a=b").mkdir()
    odd = str(tmp_path / "a=b")
    assert score.parse_models(["owner/name", "x=owner/name", odd]) == {
        "owner/name": "owner/name",
        "x": "owner/name",
        "a=b": odd,
    }
    for texts, message in ((["=x"], "NAME=DIR"), (["x="], "NAME=DIR"), (["x=a", "x=b"], "is taken")):
        with pytest.raises(UserError, match=message):
            score.parse_models(texts)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "./none"], "./none: no such folder"),
        (["--model", "a/b", "--limit", "0"], "--limit 0: must be at least 1"),
        (["--model", "a/b", "--tasks", ","], "names no task"),
        (["--model", "a/b", "--tasks", "none"], "--tasks none leaves nothing to measure"),
        (["--model", "a/b", "--data", "./none"], "not a prepared corpus"),
    ],
)
def test_bad_input_is_one_line(more, message, tmp_path, capsys):
    assert score.main([*more, "--output", str(tmp_path / "r.json")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def row(name, acc, **more):
    scores = {"acc": acc, "stderr": 0.03, "acc_norm": acc + 0.1, "acc_norm_stderr": 0.04, "split": "test"}
    plain = {**scores, "acc_norm": None, "acc_norm_stderr": None}
    return {"name": name, "tasks": {"sciq": scores, "winogrande": plain, "boolq": scores}, **more}


def test_table():
    models = [row("a", 0.25, num_params_total=1_066_900_000), row("b", 0.5)]
    models[0]["wikitext"] = {"word_perplexity": 20.371}
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in results_table(models).split("\n")
    ]
    assert lines[0] == ["model", "WinoGrande", "SciQ", "boolq", "avg", "wiki ppl", "total"]
    assert lines[2] == ["a", "25.0", "25.0", "25.0", "25.0", "20.37", "1067M"]
    assert lines[3] == ["b", "50.0", "50.0", "50.0", "50.0", "-", "-"]
    norm = results_table(models, "acc_norm").split("\n")
    assert [cell.strip() for cell in norm[2].strip("|").split("|")] == ["a", "-", "35.0", "35.0", "31.7"]
    assert acc_norm_note(models).startswith("No acc_norm: WinoGrande;")
    models[1]["tasks"]["sciq"]["split"] = "validation"
    assert "SciQ (val)" in results_table(models)
    assert len({len(line) for line in markdown([["a", "b"], ["long", "1"]]).split("\n")}) == 1


def test_average_of_tasks():
    tasks = row("a", 0.25)["tasks"]
    mean, stderr = task_average(tasks, "acc_norm")
    assert mean == pytest.approx((0.35 + 0.25 + 0.35) / 3)  # WinoGrande counts with its acc
    assert stderr == pytest.approx((0.04**2 + 0.03**2 + 0.04**2) ** 0.5 / 3)
    assert task_average({}) is None


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (31_872, "32K"), (3_219_000, "3.2M"), (1_066_900_000, "1067M")]
)
def test_count(value, text):
    assert count(value) == text


def test_results_file_without_sidecar_starts_anew(tmp_path):
    results = ResultsFile(tmp_path / "r.json", {"limit": 1}, {})
    results.add({"name": "a", "path": "x/y", "fingerprint": None}, {"piqa": {"ids": "i", "acc": "1"}}, {})
    again = ResultsFile(tmp_path / "r.json", {"limit": 1}, {}, resume=True)
    assert again.has("a", "x/y") and not again.has("a", "x/z") and not again.has("b", "x/y")
    results.sidecar.unlink()
    assert not ResultsFile(tmp_path / "r.json", {"limit": 1}, {}, resume=True).has("a", "x/y")
    one = {"piqa": {"ids": "i", "acc": "1"}}
    (pair,) = paired({"a": one, "b": one}, ["a", "b"])
    assert pair["piqa"] == {"difference": 0.0, "stderr": None, "tie": True}


def test_fingerprint(tmp_path):
    assert fingerprint("owner/name") is None
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    (tmp_path / "config.json").write_text("{ }", encoding="utf-8")
    assert fingerprint(tmp_path) != before


def test_a_longer_context_than_that_of_training_is_told(place, tmp_path, capsys):
    """The folder of a run says what it was trained on."""
    shutil.copytree(place / "twin", tmp_path / "run" / "final")
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"config": {"data": {"sequence_length": 16}}}))
    for length, told in ((32, True), (16, False)):
        words = ["--tasks", "none", "--data", place / "corpus", "--sequence-length", length]
        output = tmp_path / f"{length}.json"
        assert score.main([*map(str, ["--model", tmp_path / "run", *words, "--output", output])]) == 0
        assert ("trained on sequences of 16 tokens and judged on 32" in capsys.readouterr().err) == told
