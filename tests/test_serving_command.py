"""`dsmoe serve`: its arguments, what it refuses before an engine starts, and the life of the child process."""

import argparse
import json
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsmoe import cli
from dsmoe.errors import UserError
from dsmoe.serving import command, engines
from dsmoe.serving.child import check_port, run_server, url_of

SERVER = """
import http.server, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
signal.signal(signal.SIGINT, lambda *_: sys.exit(7))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def folder(tiny_config, tmp_path):
    """A folder that looks like a checkpoint; nothing of it is loaded here."""
    config = tiny_config(mlp_routing={"policy": "top_k", "k": 2})
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


@pytest.fixture
def both_installed(monkeypatch):
    monkeypatch.setattr(engines, "_missing", lambda engine: [])
    monkeypatch.setattr(engines, "_check_plugin", lambda: None)


@pytest.fixture
def started(monkeypatch):
    """The command lines that would have been run; the engine ends with status 3."""
    lines = []

    def run(line, _url, when_ready):
        lines.append(line)
        when_ready()
        return 3

    monkeypatch.setattr(command, "run_server", run)
    return lines


def serve(*words):
    """Exit status of `dsmoe serve`."""
    try:
        return cli.main(["serve", *map(str, words)])
    except SystemExit as stop:
        return stop.code


def test_vllm_command_line(folder, both_installed, started, free_port, capsys):
    words = [
        folder,
        "--port",
        free_port,
        "--dtype",
        "bfloat16",
        "--max-model-len",
        64,
        "--",
        "--max-num-seqs",
        4,
    ]
    assert serve(*words) == 3
    (line,) = started
    assert line[:5] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    given = dict(zip(line[3::2], line[4::2]))
    assert given["--host"] == "127.0.0.1" and given["--port"] == str(free_port)
    assert (
        given["--dtype"] == "bfloat16" and given["--max-model-len"] == "64" and given["--max-num-seqs"] == "4"
    )
    out = capsys.readouterr().out
    assert f"curl http://127.0.0.1:{free_port}/v1/completions" in out and "no chat template" in out


def test_cache_of_vllm_on_cpu(tiny_config, monkeypatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(engines, "_free_memory", lambda: 1 << 40)
    config = tiny_config()  # 2 layers, 2 heads of 8 for keys and values, 64 positions: one block of 128
    request = engines.Request(Path("folder"), "127.0.0.1", 8000, "bfloat16")
    assert engines.cache_bytes_on_cpu(config, request) == 64 * 128 * (2 * 2 * 2 * 8) * 2
    assert (
        engines.cache_bytes_on_cpu(config, replace(request, max_model_len=200))
        == 64 * 256 * (2 * 2 * 2 * 8) * 2
    )
    for more in (["--kv-cache-memory-bytes", "1G"], ["--gpu-memory-utilization=0.5"]):
        assert engines.cache_bytes_on_cpu(config, replace(request, more=more)) is None
    monkeypatch.setattr(engines, "_free_memory", lambda: 4000)
    assert engines.cache_bytes_on_cpu(config, request) == 1000
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert engines.cache_bytes_on_cpu(config, request) is None


def test_curl_example_is_json(folder):
    text = command.ready_text("http://127.0.0.1:8000", str(folder), chat=True)
    body = json.loads(text.split("-d '")[1].rstrip("'"))
    assert body["model"] == str(folder) and "chat" not in text


def test_transformers_command_line(folder, both_installed, started, free_port):
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert serve(folder, "--engine", "transformers", "--port", free_port) == 3
    (line,) = started
    assert line[2:5] == ["dsmoe.serving.transformers_server", "serve", str(folder)]
    assert line[line.index("--dtype") + 1] == "float32"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--engine", "transformers", "--max-model-len", "64"], "--max-model-len is an option of vLLM"),
        (["--max-model-len", "0"], "it must be at least 1"),
        (["--max-model-len", "65"], "was made for 64 positions"),
        (["--host", "no.such.host.invalid"], "can't listen there"),
        (["--port", "70000"], "it must be from 1 to 65535"),
    ],
)
def test_refused_arguments(folder, both_installed, started, capsys, words, says):
    assert serve(folder, *words) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not started


def test_busy_port(folder, both_installed, started, free_port, capsys):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", free_port))
        holder.listen()
        assert serve(folder, "--port", free_port) == 2
    assert "can't listen there" in capsys.readouterr().err and not started


def break_weights(folder):
    (folder / "model.safetensors").unlink()


def break_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def break_config(folder):
    (folder / "config.json").unlink()


def break_policy(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    policy = {"policy": "threshold_top_k", "threshold": 1.0, "k": None}
    path.write_text(json.dumps({**config, "mlp_routing": policy}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (break_config, "config.json is missing"),
        (break_weights, "no weights"),
        (break_tokenizer, "no tokenizer"),
        (break_policy, "requests would change each other"),
    ],
)
def test_refused_folders(folder, both_installed, started, capsys, damage, says):
    damage(folder)
    assert serve(folder) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not started


def test_no_engine(folder, monkeypatch, capsys):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    assert serve(folder) == 2
    error = capsys.readouterr().err
    assert "pip install 'vllm>=0.32'" in error and "pip install 'transformers[serving]'" in error
    for name in engines.NAMES:
        with pytest.raises(UserError, match="is not installed"):
            engines.choose_engine(name)


def test_vllm_without_the_entry_point(monkeypatch):
    monkeypatch.setattr(engines, "_missing", lambda engine: [])
    monkeypatch.setattr(engines.importlib.metadata, "entry_points", lambda group: [])
    with pytest.raises(UserError, match="entry point"):
        engines.choose_engine("auto")
    found = [argparse.Namespace(name="dsmoe")]
    monkeypatch.setattr(engines.importlib.metadata, "entry_points", lambda group: found)
    assert engines.choose_engine("auto") == "vllm"
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(UserError, match="VLLM_PLUGINS"):
        engines.choose_engine("auto")


def test_urls():
    assert url_of("0.0.0.0", 1) == "http://127.0.0.1:1" and url_of("::", 2) == "http://[::1]:2"


def test_a_server_ends_with_its_own_status(free_port):
    check_port("127.0.0.1", free_port)
    url = url_of("127.0.0.1", free_port)
    assert run_server([sys.executable, "-c", "raise SystemExit(5)"], url, lambda: None) == 5
    killed = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    assert run_server(killed, url, lambda: None) == 128 + signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_server(free_port, number):
    program = (
        "import sys; from dsmoe.serving.child import run_server, url_of\n"
        f"server = [sys.executable, '-c', {SERVER!r}, '{free_port}']\n"
        f"raise SystemExit(run_server(server, url_of('127.0.0.1', {free_port}), lambda: print('ready')))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "ready\n"
    parent.send_signal(number)
    assert parent.wait(20) == 7
    parent.stdout.close()
    end = time.monotonic() + 5
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", free_port)):
                return
        time.sleep(0.1)
    pytest.fail("the server outlived its parent")
