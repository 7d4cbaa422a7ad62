"""`eval/score.py`: the results file, resuming it, and the tables."""

import json

import pytest
from test_data_benchmarks import ROWS
from test_data_loader import write_corpus
from test_evaluation_harness import save_model
from transformers import AutoTokenizer

from dsmoe.data.benchmarks import write_benchmarks
from dsmoe.data.loader import evaluation_batches
from dsmoe.errors import UserError
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

    from dsmoe.data.corpus import TokenCorpus

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
