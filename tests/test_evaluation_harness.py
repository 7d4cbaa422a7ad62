"""Scoring with lm-eval: against likelihoods computed by hand, and against lm-eval's own command line."""

import json
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_data_benchmarks import ROWS
from transformers import LlamaConfig, LlamaForCausalLM

from dsmoe.config import DSMoEConfig
from dsmoe.data.benchmarks import write_benchmarks
from dsmoe.data.tokenization import train_tokenizer
from dsmoe.errors import UserError
from dsmoe.evaluation import harness
from dsmoe.evaluation.loading import load_model, model_path
from dsmoe.model import DSMoEForCausalLM

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def save_model(path, seed=0, **options):
    """A random Llama, or with `kind` a model of our own, with a byte-level tokenizer."""
    tokenizer = train_tokenizer(["Question: Open jar? Answer: water, the lid."] * 3, 280)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.4,
        "max_position_embeddings": 256,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    if "kind" in options:
        model = DSMoEForCausalLM(DSMoEConfig(**{**sizes, **options}))
    else:
        model = LlamaForCausalLM(LlamaConfig(**{**sizes, **options}))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    # lm-eval reads the questions through datasets, which keeps copies
    import datasets.config

    datasets.config.HF_DATASETS_CACHE, before = str(folder / "cache"), datasets.config.HF_DATASETS_CACHE
    write_benchmarks(ROWS, folder / "tasks")
    save_model(folder / "llama")
    yield folder
    datasets.config.HF_DATASETS_CACHE = before


def likelihoods(loaded, context, choices):
    """Log-likelihood of each choice after the context, one forward pass each."""
    found = []
    for choice in choices:
        start = len(loaded.tokenizer(context)["input_ids"])
        ids = loaded.tokenizer(context + choice)["input_ids"]
        with torch.no_grad():
            logits = loaded.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append(sum(logits[i - 1, ids[i]].item() for i in range(start, len(ids))))
    return found


def best(values):
    return max(range(len(values)), key=values.__getitem__)


def piqa(loaded, row):
    choices = [row["sol1"], row["sol2"]]
    values = likelihoods(loaded, f"Question: {row['goal']}\nAnswer:", [f" {choice}" for choice in choices])
    norm = [value / len(choice) for value, choice in zip(values, choices, strict=True)]
    return best(values) == row["label"], best(norm) == row["label"]


def arc(loaded, row):
    choices, gold = row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])
    values = likelihoods(
        loaded, f"Question: {row['question']}\nAnswer:", [f" {choice}" for choice in choices]
    )
    norm = [value / len(choice) for value, choice in zip(values, choices, strict=True)]
    return best(values) == gold, best(norm) == gold


def sciq(loaded, row):
    choices = [row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]]
    context = f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:"
    values = likelihoods(loaded, context, [f" {choice}" for choice in choices])
    norm = [value / len(choice) for value, choice in zip(values, choices, strict=True)]
    return best(values) == 3, best(norm) == 3


def test_accuracies_equal_likelihoods_by_hand(place, capfd):
    loaded = load_model(place / "llama", device="cpu")
    found = harness.score_model(loaded, harness.PAPER_TASKS, include_path=place / "tasks", batch_size=3)
    assert list(found["tasks"]) == list(harness.PAPER_TASKS)
    for task, outcome in {"piqa": piqa, "arc_easy": arc, "sciq": sciq}.items():
        acc, norm = zip(*(outcome(loaded, row) for row in ROWS[task]), strict=True)
        assert found["questions"][task]["acc"] == "".join(str(int(right)) for right in acc)
        assert found["questions"][task]["acc_norm"] == "".join(str(int(right)) for right in norm)
        assert found["tasks"][task]["acc"] == pytest.approx(sum(acc) / len(acc))
        assert found["tasks"][task]["acc_norm"] == pytest.approx(sum(norm) / len(norm))
    assert {task: scores["num_questions"] for task, scores in found["tasks"].items()} == {
        task: len(rows) for task, rows in ROWS.items()
    }
    assert found["tasks"]["sciq"]["split"] == "validation" and found["tasks"]["arc_easy"]["split"] == "test"
    assert found["tasks"]["winogrande"]["acc_norm"] is None
    assert found["tasks"]["arc_challenge"]["stderr"] is None  # one question
    assert found["num_truncated"] == 0
    assert capfd.readouterr() == ("", "")  # nothing of lm-eval's; the bar only shows on a terminal
    assert logging.getLogger("lm_eval").level != logging.CRITICAL


def test_limit_takes_the_first_questions(place):
    loaded = load_model(place / "llama", device="cpu")
    options = {"include_path": place / "tasks", "batch_size": 4}
    full = harness.score_model(loaded, ["piqa", "hellaswag"], **options)["questions"]
    part = harness.score_model(loaded, ["piqa", "hellaswag"], limit=2, **options)["questions"]
    for task in ("piqa", "hellaswag"):
        assert part[task]["acc"] == full[task]["acc"][:2]
        assert part[task]["ids"] != full[task]["ids"]


def test_batch_size_does_not_matter_to_a_sparse_model(place):
    routing = {"policy": "threshold", "threshold": 0.9}
    save_model(place / "sparse", kind="dsmoe", num_experts=4, mlp_routing=routing)
    loaded = load_model(place / "sparse", device="cpu")
    options = {"include_path": place / "tasks"}
    found = [harness.score_model(loaded, ["piqa", "arc_easy"], batch_size=size, **options) for size in (1, 7)]
    assert found[0]["questions"] == found[1]["questions"]


def test_long_questions_are_counted(place):
    loaded = load_model(save_model(place / "short", max_position_embeddings=24), device="cpu")
    found = harness.score_model(loaded, ["arc_easy"], include_path=place / "tasks")
    assert found["num_truncated"] > 0
    # a limit below the model's own cuts as a model of that context does; one above changes nothing
    longer = load_model(save_model(place / "longer", max_position_embeddings=64), device="cpu")
    cut = harness.score_model(longer, ["arc_easy"], include_path=place / "tasks", max_length=24)
    assert cut == found
    assert harness.score_model(loaded, ["arc_easy"], include_path=place / "tasks", max_length=64) == found


def test_an_answer_that_does_not_fit_is_told(place):
    loaded = load_model(save_model(place / "tiny", max_position_embeddings=64), device="cpu")
    with pytest.raises(UserError, match="--max-length 2: the longest answer") as raised:
        harness.score_model(loaded, ["arc_easy"], include_path=place / "tasks", max_length=2)
    # the length that the message names is the first that works
    longest = int(re.search(r"give at least ([0-9]+)", str(raised.value))[1])
    harness.score_model(loaded, ["arc_easy"], include_path=place / "tasks", max_length=longest)
    with pytest.raises(UserError, match=f"--max-length {longest - 1}: "):
        harness.score_model(loaded, ["arc_easy"], include_path=place / "tasks", max_length=longest - 1)
    # where the model's own context is the limit, no --max-length helps
    short = load_model(save_model(place / "shorter", max_position_embeddings=longest - 1), device="cpu")
    for limit in (None, longest):
        with pytest.raises(UserError, match=f"has {longest} tokens.* the model's context is {longest - 1}"):
            harness.score_model(short, ["arc_easy"], include_path=place / "tasks", max_length=limit)


def test_parse_tasks():
    assert harness.parse_tasks("paper") == list(harness.PAPER_TASKS)
    assert harness.parse_tasks("boolq, piqa") == ["boolq", "piqa"]
    for text, message in (("", "names no task"), ("paper,piqa", "piqa is named twice")):
        with pytest.raises(UserError, match=message):
            harness.parse_tasks(text)


def test_errors(place, tmp_path):
    loaded = load_model(place / "llama", device="cpu")
    with pytest.raises(UserError, match="no such folder of tasks"):
        harness.score_model(loaded, ["piqa"], include_path=tmp_path / "none")
    with pytest.raises(UserError, match="--limit 0"):
        harness.score_model(loaded, ["piqa"], limit=0)
    broken = tmp_path / "tasks"
    write_benchmarks({"piqa": ROWS["piqa"]}, broken)
    (broken / "piqa.jsonl").unlink()
    with pytest.raises(UserError, match="data cannot be read"):
        harness.score_model(loaded, ["piqa"], include_path=broken)
    for path, message in (
        (tmp_path, "has no config.json"),
        ("./none", "no such folder"),
        ("a/b/c", "no such"),
    ):
        with pytest.raises(UserError, match=message):
            model_path(str(path))
    with pytest.raises(UserError, match="must be one of float32"):
        load_model(place / "llama", dtype="float99")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard"}), encoding="utf-8")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(tmp_path)


@pytest.mark.slow
def test_equals_the_command_line(place):
    tasks = ["hellaswag", "piqa", "winogrande", "sciq", "arc_easy"]
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--limit", "3"]
    command += ["--model_args", f"pretrained={place / 'llama'},trust_remote_code=True,dtype=float32"]
    command += [
        "--include_path",
        str(place / "tasks"),
        "--tasks",
        ",".join(f"{task}_local" for task in tasks),
    ]
    command += ["--output_path", str(place / "cli.json")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(place / "cache")}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    (output,) = place.glob("cli_*.json")
    theirs = json.loads(output.read_text(encoding="utf-8"))["results"]
    loaded = load_model(place / "llama", device="cpu")
    ours = harness.score_model(loaded, tasks, include_path=place / "tasks", limit=3)["tasks"]
    for task in tasks:
        assert ours[task]["acc"] == theirs[f"{task}_local"]["acc,none"]
        assert ours[task]["stderr"] == theirs[f"{task}_local"]["acc_stderr,none"]
        assert ours[task]["acc_norm"] == theirs[f"{task}_local"].get("acc_norm,none")


def test_wikitext_perplexity(place, monkeypatch, capfd):
    pages = [" = Jar = \n The jar is open .", " Water is wet . "]
    path = place / "wikitext"
    path.mkdir()
    (path / "pages.jsonl").write_text("".join(json.dumps({"page": page}) + "\n" for page in pages), "utf-8")
    stock = harness_tasks() / "wikitext" / "wikitext.yaml"
    (path / "wikitext.yaml").write_text(
        f"include: {stock}\ntask: wikitext_local\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{test: {path / 'pages.jsonl'}}}}}\n"
        "training_split: null\nvalidation_split: null\n",
        "utf-8",
    )
    evaluate = harness._evaluate

    def without_hub(loaded, tasks, include_path, *rest):
        results, truncated = evaluate(loaded, tasks, path, *rest)
        results["results"] = {"wikitext": results["results"]["wikitext_local"]}
        return results, truncated

    monkeypatch.setattr(harness, "_evaluate", without_hub)
    loaded = load_model(place / "llama", device="cpu")
    found = harness.wikitext(loaded, batch_size=2)
    # lm-eval scores the detokenised text, and counts words and bytes of the original
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    texts = [wikitext_detokenizer({"page": page}) for page in pages]
    end = loaded.tokenizer.eos_token
    nats = -sum(likelihoods(loaded, end, [text])[0] for text in texts)
    assert found["bits_per_byte"] == pytest.approx(
        nats / math.log(2) / sum(len(page.encode()) for page in pages), rel=1e-5
    )
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    assert found["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-5)
    assert capfd.readouterr().err == ""


def harness_tasks():
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def test_outcomes_that_are_no_digit_are_not_paired():
    """Such as the probabilities of truthfulqa_mc2, of which digits would be all zeros."""
    samples = [
        {"doc_hash": str(i), "acc": p, "acc_norm": float(i % 2)} for i, p in enumerate((0.9, 1.0, 0.3))
    ]
    found = harness._questions(samples)
    assert "acc" not in found and found["acc_norm"] == "010"
    with_digits = [{**sample, "acc": i % 2} for i, sample in enumerate(samples)]
    assert harness._questions(with_digits)["acc"] == "010"
