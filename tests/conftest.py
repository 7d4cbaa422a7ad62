"""Shared fixtures: one thread, tiny models, a tiny corpus, and the trainer run in this process."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dsmoe import DSMoEConfig, DSMoEForCausalLM

# on a machine with a GPU too: processes that tests start inherit it
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # ten times the usual: routers then differ from uniform, and thresholds keep ragged sets
    "initializer_range": 0.2,
}
TRAIN = {
    "model.vocab_size": 300,
    "model.hidden_size": 32,
    "model.intermediate_size": 64,
    "model.num_hidden_layers": 2,
    "model.num_experts": 4,
    "model.num_attention_heads": 4,
    "model.num_key_value_heads": 2,
    "model.initializer_range": 0.1,
    "data.sequence_length": 16,
    "optim.learning_rate": 0.01,
    "router_loss.router_mi_loss_coef_mlp": 0.1,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 4,
    "train.total_tokens": 8 * 128,
    "train.log_every_steps": 1,
    "train.eval_tokens": 300,
}
WORDS = [
    "the",
    "cat",
    "dog",
    "bird",
    "sat",
    "ran",
    "flew",
    "on",
    "under",
    "over",
    "a",
    "mat",
    "tree",
    "house",
    "end",
    "sun",
    "moon",
    "rain",
]


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_config():
    """Makes the configuration of a tiny model."""
    return lambda **overrides: DSMoEConfig(**{**TINY, **overrides})


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """Makes a tiny model in float64 (or `dtype`), in evaluation mode."""

    def make(seed=0, dtype=torch.float64, **overrides):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return DSMoEForCausalLM(tiny_config(**overrides)).to(dtype).eval()

    return make


@pytest.fixture
def kept_experts_alone(monkeypatch):
    """Training computes the kept experts alone, however narrow they are, as it does with wider ones."""
    monkeypatch.setattr("dsmoe.model.grouped.wide_is_faster", lambda *_: False)


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory):
    """A token folder made by `dsmoe data prepare` out of 400 generated documents, with 300 tokens."""
    from dsmoe import cli

    folder = tmp_path_factory.mktemp("corpus")
    draws = torch.Generator().manual_seed(0)
    texts = []
    for index in range(400):
        chosen = torch.randint(len(WORDS), (20,), generator=draws).tolist()
        texts.append(f"{index}: " + " ".join(WORDS[word] for word in chosen))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text(lines, encoding="utf-8")
    prepared = folder / "data"
    arguments = ["--source", f"tiny={folder / 'text.jsonl'}", "--train-tokenizer", "300"]
    arguments += ["--validation-fraction", "0.1", "--output", str(prepared)]
    assert cli.main(["data", "prepare", *arguments]) == 0
    return prepared


@pytest.fixture(scope="session")
def held_out_corpus_dir(corpus_dir, tmp_path_factory):
    """The same text with a tenth for validation and a tenth for test."""
    from dsmoe import cli

    folder = tmp_path_factory.mktemp("held-out") / "data"
    arguments = ["--source", f"tiny={corpus_dir.parent / 'text.jsonl'}", "--train-tokenizer", "300"]
    arguments += ["--validation-fraction", "0.1", "--test-fraction", "0.1", "--output", str(folder)]
    assert cli.main(["data", "prepare", *arguments]) == 0
    return folder


@dataclass
class Run:
    """A training run that has ended.

    Attributes:
        status: exit status.
        folder: its output_dir.
    """

    status: int
    folder: Path

    def log(self):
        """Lines of log.jsonl without speeds, which are all that may differ between equal runs."""
        lines = (self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]

    def summary(self):
        """The run's summary.json."""
        return json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))

    def losses(self):
        """Language-modelling losses of the logged steps."""
        return [line["lm_loss"] for line in self.log() if "lm_loss" in line]

    def weights(self):
        """Tensors of the final model."""
        from safetensors.torch import load_file

        return load_file(self.folder / "final" / "model.safetensors")


@pytest.fixture(scope="session")
def train_arguments(corpus_dir):
    """Makes the command line of a tiny run: settings by dotted name over those of TRAIN."""

    def make(output_dir, **settings):
        settings = {name.replace("__", "."): value for name, value in settings.items()}
        chosen = {
            **TRAIN, "data.path": str(corpus_dir), "train.output_dir": str(output_dir), **settings,
        }  # fmt: skip
        words = []
        for name, value in chosen.items():
            shown = json.dumps(value) if isinstance(value, bool | list | dict | None) else str(value)
            words += [f"--{name}", shown]
        return words

    return make


@pytest.fixture
def train(train_arguments, tmp_path):
    """Trains in this process: train("name", train__seeds=[0, 1]) -> Run."""
    from accelerate.state import AcceleratorState, GradientState

    from dsmoe.trainer.command import main

    def run(name, *more, **settings):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return Run(main([*train_arguments(tmp_path / name, **settings), *more]), tmp_path / name)

    environment, matmul = dict(os.environ), torch.backends.mkldnn.matmul.fp32_precision
    with torch.random.fork_rng():
        yield run
    os.environ.clear()
    os.environ.update(environment)
    torch.backends.mkldnn.matmul.fp32_precision = matmul
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
