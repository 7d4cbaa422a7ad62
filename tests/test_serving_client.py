"""A client's view of `dsmoe serve`, over plain HTTP, with each engine that is installed."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dsmoe import DSMoEConfig, DSMoEForCausalLM

NEEDS = {
    "vllm": ["vllm"],
    "transformers": ["fastapi", "uvicorn", "openai", "pydantic"],
}
MORE = {
    "vllm": ["--enforce-eager", "--max-num-seqs", "4"],
    "transformers": [],
}
WORDS = ["<s>", "</s>", "<unk>", *(f"w{number}" for number in range(61))]
PROMPT = "w3 w17 w40 w5"
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random threshold model with a tokenizer of whole words and no chat template."""
    path = tmp_path_factory.mktemp("served") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DSMoEForCausalLM(
            DSMoEConfig(
                vocab_size=len(WORDS),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_experts=8,
                num_attention_heads=2,
                head_dim=32,
                max_position_embeddings=64,
                initializer_range=0.3,
                mlp_routing={"policy": "threshold", "threshold": 1.2},
            )
        )
    model.save_pretrained(path)
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected(folder):
    """The greedy answer under transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = DSMoEForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    answer = model.generate(
        ids, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=1
    )
    return tokenizer.decode(answer[0, ids.shape[1] :]).split()


@pytest.fixture(params=NEEDS)
def server(request, folder):
    """A running server: its process, and its URL."""
    engine = request.param
    if any(importlib.util.find_spec(name) is None for name in NEEDS[engine]):
        pytest.skip(f"{engine}'s server is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["serve", str(folder), "--engine", engine, "--port", str(port), "--", *MORE[engine]]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "dsmoe.cli", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        seen = []
        for line in process.stdout:
            seen.append(line)
            if "no chat template" in line:
                break
        text = "".join(seen)
        assert f"curl http://127.0.0.1:{port}/v1/completions" in text, text[-5000:]
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        text = process.communicate(timeout=90)[0]
    assert process.returncode in (0, 130), text[-5000:]


def post(url, body):
    """Status and body of a JSON request."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            request, timeout=120
        ) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.slow
def test_completions_and_chat(server, folder, expected):
    process, url = server
    body = {"model": str(folder), "prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0, "seed": 0}
    status, answer = post(f"{url}/v1/completions", body)
    assert status == 200, answer
    (choice,) = answer["choices"]
    words = choice["text"].split()
    assert words and words == expected[: len(words)]
    assert len(words) == NEW_TOKENS or choice["finish_reason"] == "stop"

    message = {"model": str(folder), "messages": [{"role": "user", "content": "w1"}], "max_tokens": 4}
    status, answer = post(f"{url}/v1/chat/completions", message)
    assert status == 400 and "chat template" in answer, answer
    assert process.poll() is None
