"""`dsmoe sparsify`: policies against naive counts, checkpoints that load, refusals."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dsmoe import DSMoEConfig, DSMoEForCausalLM
from dsmoe.accounting import count_parameters
from dsmoe.checkpoint import save_pretrained
from dsmoe.cli import main
from dsmoe.data.agreement import check_tokenizer
from dsmoe.data.corpus import TokenCorpus
from dsmoe.errors import UserError
from dsmoe.model import use_routing
from dsmoe.sparsify import ActiveExperts, PolicyRequest, measure, policies, resolve
from dsmoe.sparsify.arguments import share
from dsmoe.sparsify.frontier import frontier
from dsmoe.sparsify.measure import BINS, HIGHEST, LOWEST

VOCAB = 64


def make_model(**changes):
    torch.manual_seed(0)
    config = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_experts": 8,
        "num_attention_heads": 4,
        "initializer_range": 0.3,  # routers that decide
        **changes,
    }
    return DSMoEForCausalLM(DSMoEConfig(**config, eos_token_id=0)).eval()


def words_tokenizer(words):
    tokenizer = Tokenizer(models.WordLevel(words | {"<eos>": 0}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tokenizer of words "t0" to "t63", a text file, and two checkpoints (MLP experts; both kinds)."""
    root = tmp_path_factory.mktemp("sparsify")
    words_tokenizer({f"t{i}": i for i in range(1, VOCAB)}).save_pretrained(root / "tokenizer")
    generator = torch.Generator().manual_seed(1)
    lines = []
    for _ in range(30):
        ids = torch.randint(1, VOCAB, (20,), generator=generator).tolist()
        lines.append(json.dumps({"text": " ".join(f"t{i}" for i in ids)}))
    (root / "text.jsonl").write_text("\n".join(lines))
    save_pretrained(make_model(), root / "mlp", root / "tokenizer")
    moa = make_model(num_attention_experts=4, num_attention_heads=8, qk_norm="per_head")
    save_pretrained(moa, root / "moa", root / "tokenizer")
    return root


def sparsify(folders, tmp_path, *args, checkpoint="mlp"):
    output = tmp_path / "sparse"
    status = main(["sparsify", str(folders / checkpoint), "--output", str(output), *args])
    return status, output


def ids():
    return torch.randint(1, VOCAB, (3, 17), generator=torch.Generator().manual_seed(2))


def test_threshold_checkpoint_equals_masking_the_policy(folders, tmp_path):
    text = ["--text", str(folders / "text.jsonl"), "--sequence-length", "32"]
    status, output = sparsify(folders, tmp_path, "--policy", "threshold", "--threshold", "0.9", *text)
    assert status == 0
    sparse = AutoModelForCausalLM.from_pretrained(output)
    assert sparse.config.mlp_routing == [{"policy": "threshold", "threshold": 0.9}] * 2
    model = make_model()
    with torch.no_grad(), use_routing(model, mlp={"policy": "threshold", "threshold": 0.9}):
        expected = model(ids()).logits
        torch.testing.assert_close(sparse(ids()).logits, expected)
    report = json.loads((output / "sparsity.json").read_text())
    means = [row["mlp"]["mean"] for row in report["per_layer"]]
    assert 1 <= min(means) < 8
    counts = count_parameters(sparse.config, {"mlp": means, "attention": [1.0, 1.0]})
    assert report["num_params_total"] == sum(p.numel() for p in sparse.parameters())
    assert report["num_params_active"] == pytest.approx(counts.active, rel=1e-3)
    for row, mean in zip(report["per_layer"], means):
        assert sum(row["mlp"]["expert_share"]) == pytest.approx(mean, abs=1e-3)


def test_measure_counts_like_a_naive_loop():
    model = make_model()
    tokens = ids()
    mask = torch.ones_like(tokens)
    mask[1, 9:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask, "shift_labels": tokens.masked_fill(mask == 0, -100)}
    with use_routing(model, mlp={"policy": "threshold", "threshold": 1.0}):
        active = measure(model, [batch])
        with torch.no_grad():
            logits = model(tokens, attention_mask=mask).router_logits
    for layer, layer_logits in enumerate(logits):
        counts = []
        for row in range(3):
            for position in range(17):
                if mask[row, position]:
                    probs = layer_logits[row, position].softmax(-1)
                    counts.append(max(1, int((probs * 8 > 1.0).sum())))
        assert active.mean("mlp")[layer] == pytest.approx(sum(counts) / len(counts))
        assert active.percentile("mlp", 0.5)[layer] == sorted(counts)[(len(counts) + 1) // 2 - 1]
        assert active.num_tokens == len(counts)


def test_threshold_top_k_fixes_k_as_the_rounded_mean(folders, tmp_path):
    text = ["--text", str(folders / "text.jsonl"), "--sequence-length", "32"]
    _, plain = sparsify(folders, tmp_path / "a", "--policy", "threshold", "--threshold", "0.9", *text)
    _, fixed = sparsify(folders, tmp_path / "b", "--policy", "threshold_top_k", "--threshold", "0.9", *text)
    means = [row["mlp"]["mean"] for row in json.loads((plain / "sparsity.json").read_text())["per_layer"]]
    policies = json.loads((fixed / "config.json").read_text())["mlp_routing"]
    assert [policy["k"] for policy in policies] == [max(1, round(mean)) for mean in means]


@pytest.mark.parametrize("target", [0.2, 0.3, 0.45, 0.8])
def test_roundings_of_k_make_up_for_each_other(folders, tmp_path, target):
    text = ["--text", str(folders / "text.jsonl"), "--sequence-length", "32"]
    words = ["--policy", "threshold_top_k", "--target-active", str(target), *text]
    status, output = sparsify(folders, tmp_path, *words)
    assert status == 0
    config = json.loads((output / "config.json").read_text())
    layers, experts = config["num_hidden_layers"], config["num_experts"]
    assert sum(policy["k"] for policy in config["mlp_routing"]) == round(target * experts * layers)


@pytest.mark.parametrize("target", [0.2, 0.4, 0.8])
def test_target_active_is_met(folders, tmp_path, target):
    text = ["--text", str(folders / "text.jsonl"), "--sequence-length", "32"]
    status, output = sparsify(
        folders, tmp_path, "--policy", "threshold", "--target-active", str(target), *text
    )
    assert status == 0
    report = json.loads((output / "sparsity.json").read_text())
    assert report["mlp_active_fraction"] == pytest.approx(target, abs=0.01)


@pytest.mark.parametrize("target", [0.33, 0.8])
def test_a_target_is_met_where_routers_are_nearly_certain(folders, tmp_path, target):
    """Most experts get next to nothing, and the threshold between them is tiny; rounded to zero it keeps all."""
    model = make_model(num_experts=16)
    generator = torch.Generator().manual_seed(3)
    for layer in model.model.layers:
        weight = layer.mlp.router.weight.data
        weight.copy_(3 * torch.randn(weight.shape, generator=generator))
    save_pretrained(model, tmp_path / "model", folders / "tokenizer")
    words = ["--policy", "threshold", "--target-active", str(target), "--text", str(folders / "text.jsonl")]
    assert main(["sparsify", str(tmp_path / "model"), "--output", str(tmp_path / "sparse"), *words]) == 0
    report = json.loads((tmp_path / "sparse" / "sparsity.json").read_text())
    assert report["mlp_active_fraction"] == pytest.approx(target, abs=0.01)
    assert 0 < report["policy"]["mlp"][0]["threshold"] < 5e-7


def test_a_target_that_no_threshold_gives_is_refused(folders, tmp_path, capsys):
    """Routers that say nothing: a threshold keeps one expert or all."""
    model = make_model()
    for layer in model.model.layers:
        layer.mlp.router.weight.data.zero_()
    save_pretrained(model, tmp_path / "model", folders / "tokenizer")
    words = ["--policy", "threshold", "--target-active", "0.5", "--text", str(folders / "text.jsonl")]
    assert main(["sparsify", str(tmp_path / "model"), "--output", str(tmp_path / "sparse"), *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: --target-active 0.5: the nearest share of mlp experts")
    assert "is 0.125; ask for a share near it" in error and "--policy top_k" in error
    assert not (tmp_path / "sparse").exists()


def test_a_threshold_is_at_most_the_number_of_experts():
    """The bin of the histogram that holds N ends above it."""
    model = make_model()
    scores = torch.zeros(BINS, dtype=torch.int64)
    for value, count in ((3.0, 10), (LOWEST, 70)):
        scores[min(BINS - 1, int((value - LOWEST) / (HIGHEST - LOWEST) * BINS))] += count

    def one_expert_where_only_n_is_high_enough():
        kept = 1 if model.config.routing("mlp", 0)["threshold"] >= 7.9 else 8
        counts = torch.zeros(9, dtype=torch.int64)
        counts[kept] = 10
        return ActiveExperts(counts={"mlp": [counts] * 2}, scores={"mlp": scores}, num_tokens=10)

    request = PolicyRequest("threshold", target_active=0.125)
    found = resolve(model, "mlp", request, one_expert_where_only_n_is_high_enough)
    assert 7.9 <= found[0]["threshold"] <= 8.0


def test_top_k_needs_no_text_and_takes_one_k_per_layer(folders, tmp_path):
    status, output = sparsify(folders, tmp_path, "--policy", "top_k", "--k", "3,1")
    assert status == 0
    report = json.loads((output / "sparsity.json").read_text())
    assert [policy["k"] for policy in report["policy"]["mlp"]] == [3, 1]
    assert report["mlp_active_fraction"] == pytest.approx(4 / 16)


def test_attention_experts_follow_the_threshold_and_stay_whole_under_top_k(folders, tmp_path):
    text = ["--text", str(folders / "text.jsonl"), "--sequence-length", "32"]
    _, output = sparsify(
        folders, tmp_path / "a", "--policy", "threshold", "--threshold", "0.7", *text, checkpoint="moa"
    )
    config = AutoModelForCausalLM.from_pretrained(output).config
    assert config.attention_routing == [{"policy": "threshold", "threshold": 0.7}] * 2
    _, output = sparsify(folders, tmp_path / "b", "--policy", "top_k", "--k", "2", checkpoint="moa")
    assert AutoModelForCausalLM.from_pretrained(output).config.attention_routing == [{"policy": "dense"}] * 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--policy", "top_k", "--k", "9"], ["9", "1 to 8"]),
        (["--policy", "top_k"], ["--k"]),
        (["--policy", "top_k", "--k", "1,2,3"], ["3 values", "2 layers"]),
        (["--policy", "threshold", "--threshold", "0.5"], ["--text"]),
        (["--policy", "threshold", "--target-active", "0.01", "--text", "TEXT"], ["0.01"]),
        (["--policy", "threshold", "--threshold", "nan", "--text", "TEXT"], ["nan"]),
        (["--policy", "top_k", "--k", "2", "--text", "missing.jsonl"], ["missing.jsonl"]),
        (["--target-active", "0.5", "--text", "TEXT", "--seed", "-1"], ["--seed -1"]),
        (
            ["--policy", "threshold", "--threshold", "0.5", "--text", "TEXT", "--seed", "0"],
            ["--seed 0", "--policy"],
        ),
        (
            ["--target-active", "0.5", "--text", "TEXT", "--split", "train"],
            ["--split train", "text.jsonl", "--data"],
        ),
        (["--policy", "top_k", "--k", "2", "--split", "validation"], ["--split validation", "--data"]),
        (["--max-flops-per-token", "nan", "--text", "TEXT"], ["--max-flops-per-token nan"]),
        (["--max-flops-per-token", "inf", "--text", "TEXT"], ["--max-flops-per-token inf"]),
        (["--target-active", "0.5", "--text", "TEXT", "--sequence-length", "4096"], ["4096", "at most"]),
        # nothing is passed over
        (["--policy", "top_k", "--k", "2", "--threshold", "0.4"], ["--threshold 0.4", "'top_k'"]),
        (["--policy", "top_k", "--k", "2", "--target-active", "0.4"], ["--target-active 0.4", "'top_k'"]),
        (["--policy", "dense", "--k", "2,3"], ["--k 2,3", "'dense'", "with top_k"]),
        (["--policy", "threshold_top_k", "--threshold", "0.5", "--k", "2", "--text", "TEXT"], ["--k 2"]),
        (
            ["--policy", "threshold", "--threshold", "0.5", "--top-p", "0.5", "--text", "TEXT"],
            ["--top-p 0.5"],
        ),
        (
            ["--policy", "threshold", "--threshold", "0.5", "--target-active", "0.5", "--text", "TEXT"],
            ["--threshold 0.5", "--target-active 0.5"],
        ),
        (["--policy", "top_k", "--k", "2", "--attention-k", "2"], ["--attention-k 2", "'dense'"]),
        (
            ["--policy", "threshold", "--threshold", "0.5", "--attention-threshold", "1", "--text", "TEXT"],
            ["--attention-threshold 1", "no attention experts"],
        ),
    ],
)
def test_bad_requests_get_one_line_and_write_nothing(folders, tmp_path, capsys, args, words):
    args = [str(folders / "text.jsonl") if word == "TEXT" else word for word in args]
    status, output = sparsify(folders, tmp_path, *args)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2
    assert error.startswith("error: ")
    assert all(word in error for word in words), error
    assert not output.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_is_refused(folders, tmp_path, capsys):
    (tmp_path / "sparse").mkdir()
    (tmp_path / "sparse" / "precious").write_text("x")
    status, output = sparsify(folders, tmp_path, "--policy", "top_k", "--k", "2")
    assert status == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (output / "precious").read_text() == "x"


@pytest.mark.parametrize(("text", "value"), [("0.5", 0.5), ("33%", 0.33), ("1", 1.0), ("100%", 1.0)])
def test_a_share_may_be_a_percentage(text, value):
    assert share(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["0", "2", "nan", "120%", "-1", "some", "%"])
def test_a_share_that_is_none_is_refused_by_name_at_once(folders, tmp_path, capsys, text):
    with pytest.raises(SystemExit) as stopped:
        sparsify(folders, tmp_path, f"--target-active={text}", "--text", str(folders / "text.jsonl"))
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--target-active" in error and "above 0 and at most 1 (0.33 or 33%)" in error


def test_an_smoe_is_not_made_dense(folders, tmp_path, capsys):
    """Its config would be refused wherever the checkpoint is loaded."""
    for name, changes, option in [
        ("mlp", {"mlp_routing": {"policy": "top_k", "k": 2}}, "--policy top_k --k 8"),
        ("attention", {"num_experts": 1, "num_attention_experts": 4, "qk_norm": "per_head",
                       "attention_routing": {"policy": "top_k", "k": 2}},
         "--attention-policy top_k --attention-k 4"),
    ]:  # fmt: skip
        save_pretrained(make_model(kind="smoe", **changes), tmp_path / name, folders / "tokenizer")
        words = ["sparsify", str(tmp_path / name), "--output", str(tmp_path / "out")]
        assert main([*words, "--policy", "dense"]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and option in error
        assert not (tmp_path / "out").exists()
        # what it advises gives a checkpoint that loads
        advised = option.split() if name == "mlp" else ["--policy", "dense", *option.split()]
        assert main([*words, *advised]) == 0
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")


def test_the_checkpoint_keeps_its_dtype_unless_told_otherwise(folders, tmp_path):
    save_pretrained(make_model().to(torch.bfloat16), tmp_path / "half", folders / "tokenizer")
    whole = load_file(tmp_path / "half" / "model.safetensors")
    wanted = {None: torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
    for name, dtype in wanted.items():
        output = tmp_path / f"sparse-{name}"
        words = [
            "--policy",
            "top_k",
            "--k",
            "2",
            "--output",
            str(output),
            *(["--dtype", name] if name else []),
        ]
        assert main(["sparsify", str(tmp_path / "half"), *words]) == 0
        written = load_file(output / "model.safetensors")
        assert written.keys() == whole.keys()
        assert all(torch.equal(written[key], value.to(dtype)) for key, value in whole.items())
        assert AutoModelForCausalLM.from_pretrained(output, dtype="auto").dtype == dtype
    _, output = sparsify(folders, tmp_path, "--policy", "top_k", "--k", "2")
    assert {value.dtype for value in load_file(output / "model.safetensors").values()} == {torch.float32}


def test_frontier_restores_the_policy_and_all_experts_is_the_dense_loss():
    model = make_model()
    tokens = ids()
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "shift_labels": tokens}
    points = frontier(model, [batch], [{"policy": "top_k", "k": k} for k in (2, 8)])
    assert model.config.mlp_routing == [{"policy": "dense"}] * 2
    assert points[1]["loss"] == pytest.approx(measure(model, [batch]).loss, abs=1e-6)
    assert points[0]["mlp_active_fraction"] == pytest.approx(0.25)
    assert points[0]["num_params_active"] < points[1]["num_params_active"]


def test_a_checkpoint_with_missing_weights_is_refused(folders, tmp_path, capsys):
    """transformers would draw them at random and warn."""
    from safetensors.torch import save_file

    damaged = tmp_path / "damaged"
    shutil.copytree(folders / "mlp", damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors.pop("model.layers.1.mlp.router.weight")
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    status = main(
        ["sparsify", str(damaged), "--policy", "top_k", "--k", "2", "--output", str(tmp_path / "out")]
    )
    assert status == 2
    assert "model.layers.1.mlp.router.weight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_read_is_not_replaced(folders, tmp_path, capsys):
    shutil.copytree(folders / "mlp", tmp_path / "parent" / "run" / "final")
    shutil.copy(folders / "text.jsonl", tmp_path / "parent" / "text.jsonl")
    (tmp_path / "texts").mkdir()
    shutil.copy(folders / "text.jsonl", tmp_path / "texts")
    run, text = tmp_path / "parent" / "run", tmp_path / "texts" / "text.jsonl"
    before = sorted(tmp_path.rglob("*"))
    for output in (run, run / "final", tmp_path / "parent", tmp_path / "texts"):
        words = ["--policy", "top_k", "--k", "2", "--text", str(text), "--output", str(output), "--overwrite"]
        assert main(["sparsify", str(run), *words]) == 2
        assert "which is read" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


GOALS = (["--target-active", "0.5"], ["--policy", "threshold", "--threshold", "0.9"])


@pytest.mark.parametrize("goal", GOALS)
def test_blank_documents_are_no_text(folders, tmp_path, capsys, goal):
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"text": ""}\n{"text": " \\n"}\n')
    (tmp_path / "empty.txt").touch()
    for file in (blank, tmp_path / "empty.txt"):
        status, output = sparsify(folders, tmp_path, *goal, "--text", str(file))
        assert status == 2
        assert "no text to calibrate on" in capsys.readouterr().err
        assert not output.exists()


def test_blank_documents_change_nothing(folders, tmp_path):
    text = (folders / "text.jsonl").read_text()
    (tmp_path / "more.jsonl").write_text('{"text": "  "}\n' + text + '\n{"text": ""}\n')
    reports = []
    for file in (folders / "text.jsonl", tmp_path / "more.jsonl"):
        _, output = sparsify(folders, tmp_path / file.stem, *GOALS[1], "--text", str(file))
        reports.append(json.loads((output / "sparsity.json").read_text()))
    assert reports[0] == reports[1]


def test_attention_experts_follow_a_target_with_a_threshold_of_their_own(folders, tmp_path):
    text = ["--text", str(folders / "text.jsonl"), "--sequence-length", "32"]
    words = ["--policy", "threshold", "--target-active", "0.5", *text]
    _, output = sparsify(folders, tmp_path, *words, checkpoint="moa")
    report = json.loads((output / "sparsity.json").read_text())
    for part, experts in (("mlp", 8), ("attention", 4)):
        mean = sum(row[part]["mean"] for row in report["per_layer"]) / 2
        assert mean / experts == pytest.approx(0.5, abs=0.01)


def test_a_target_that_is_missed_once_both_parts_are_sparse_is_sought_again(monkeypatch):
    """Sparse attention shifts the routing of the MLP, whose threshold was found before it."""
    model = make_model(num_attention_experts=4, num_attention_heads=8, qk_norm="per_head")
    requests = {part: PolicyRequest("threshold", target_active=0.5) for part in ("mlp", "attention")}
    shares = {"mlp": [0.4, 0.505], "attention": [0.5, 0.5]}
    rounds = []

    def found(model, part, request, measure):
        rounds.append(part)
        layers = model.config.num_hidden_layers
        return [{"policy": "threshold", "threshold": 1.0}] * layers

    class Active:
        def share(self, part):
            return shares[part][min(len(rounds) // 2, len(shares[part])) - 1]

    monkeypatch.setattr(policies, "resolve", found)
    assert policies.resolve_all(model, requests, Active).share("mlp") == 0.505
    assert rounds == ["mlp", "attention"] * 2
    rounds.clear()
    shares["mlp"] = [0.4]
    with pytest.raises(UserError, match=r"--target-active 0\.5: .* of mlp experts .* is 0\.4"):
        policies.resolve_all(model, requests, Active)


def test_attention_experts_take_the_shared_threshold_beside_another_policy(folders, tmp_path):
    words = ["--policy", "top_k", "--k", "2", "--attention-policy", "threshold", "--threshold", "0.7"]
    text = ["--text", str(folders / "text.jsonl")]
    status, output = sparsify(folders, tmp_path, *words, *text, checkpoint="moa")
    assert status == 0
    routing = json.loads((output / "config.json").read_text())["attention_routing"]
    assert routing == [{"policy": "threshold", "threshold": 0.7}] * 2


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_a_tokenizer_that_cannot_be_used_is_one_line(folders, tmp_path, capsys, damage, goal):
    shutil.copytree(folders / "mlp", tmp_path / "model")
    if damage == "missing":
        for file in tmp_path.glob("model/*token*"):
            file.unlink()
    else:
        (tmp_path / "model" / "tokenizer.json").write_text("{")
    words = [*goal, "--text", str(folders / "text.jsonl"), "--output", str(tmp_path / "sparse")]
    assert main(["sparsify", str(tmp_path / "model"), *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / 'model'}: the") and "tokenizer" in error
    assert not (tmp_path / "sparse").exists()


def test_windows_are_no_longer_than_the_model_takes(folders, tmp_path):
    save_pretrained(make_model(max_position_embeddings=40), tmp_path / "short", folders / "tokenizer")
    words = ["--policy", "top_k", "--k", "2", "--output", str(tmp_path / "sparse")]
    assert main(["sparsify", str(tmp_path / "short"), *words]) == 0
    assert json.loads((tmp_path / "sparse" / "sparsity.json").read_text())["context_length"] == 40


def prepared(folders, output, tokenizer):
    words = ["--source", f"text={folders / 'text.jsonl'}", "--tokenizer", str(tokenizer)]
    words += ["--validation-fraction", "0.5", "--output", str(output)]
    assert main(["data", "prepare", *words]) == 0
    return ["--data", str(output), "--sequence-length", "16"]


@pytest.mark.parametrize("goal", [["--policy", "threshold"], []], ids=["by hand", "calibrated"])
def test_tokens_of_another_tokenizer_are_refused(folders, tmp_path, capsys, goal):
    """As many entries, and all known: only what they stand for differs."""
    words_tokenizer({f"t{i}": VOCAB - i for i in range(1, VOCAB)}).save_pretrained(tmp_path / "other")
    data = prepared(folders, tmp_path / "data", tmp_path / "other")
    goal = [*goal, "--target-active", "0.5"]
    capsys.readouterr()
    status, output = sparsify(folders, tmp_path, *goal, *data)
    assert status == 2 and not output.exists()
    error = capsys.readouterr().err.strip()
    assert "another tokenizer" in error and "token 1 is 't63' there, 't1' here" in error
    assert f"`dsmoe data prepare --tokenizer {folders / 'mlp'}`" in error and "\n" not in error
    # what the line says to do
    assert sparsify(folders, tmp_path, *goal, *prepared(folders, tmp_path / "again", folders / "mlp"))[0] == 0


def test_a_model_without_a_tokenizer_takes_any_tokens_with_a_note(folders, tmp_path, capsys):
    save_pretrained(make_model(), tmp_path / "bare", None)
    data = prepared(folders, tmp_path / "data", folders / "tokenizer")
    capsys.readouterr()
    words = ["--policy", "threshold", "--target-active", "0.5", *data, "--json"]
    assert main(["sparsify", str(tmp_path / "bare"), "--output", str(tmp_path / "sparse"), *words]) == 0
    said = capsys.readouterr()
    assert f"note: no tokenizer can be read in {tmp_path / 'bare'}" in said.err
    json.loads(said.out)
    assert sparsify(folders, tmp_path / "with", *words)[0] == 0
    assert "note" not in capsys.readouterr().err


def test_tokens_added_to_a_tokenizer_are_its_own(folders, tmp_path):
    """The copy in the prepared text has them too, although its files differ."""
    tokenizer = words_tokenizer({f"t{i}": i for i in range(1, VOCAB - 2)})
    tokenizer.add_tokens(["<|chat|>"])
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    save_pretrained(make_model(), tmp_path / "model", tmp_path / "tokenizer")
    corpus = TokenCorpus(prepared(folders, tmp_path / "data", tmp_path / "model")[1])
    assert check_tokenizer(corpus, tmp_path / "model") is None
