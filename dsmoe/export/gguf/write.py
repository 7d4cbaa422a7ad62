"""A GGUF export from end to end: load, refuse or convert, read back, compare, and only then let the file appear."""

import os
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dsmoe import __version__
from dsmoe.checkpoint.pretrained import load_pretrained, stored_dtype
from dsmoe.errors import UserError
from dsmoe.export.check import (
    EXACT,
    ROUNDED,
    Agreement,
    check_tokens,
    compare,
    outputs_of,
    require_agreement,
    router_scale,
)
from dsmoe.export.gguf.engine import EngineReport, check_engine
from dsmoe.export.gguf.forms import GGUF_DTYPES, gguf_architecture
from dsmoe.export.gguf.notes import gguf_notes
from dsmoe.export.gguf.read import read_gguf
from dsmoe.export.gguf.tensors import add_hyper_parameters, add_tensors, round_as_stored
from dsmoe.export.gguf.tokenizer import Vocabulary, add_vocabulary, read_vocabulary
from dsmoe.export.requirements import uniform_top_k
from dsmoe.export.targets import is_exact, target_model
from dsmoe.files import sha256

SUFFIX = ".gguf"


def export_gguf(
    checkpoint: str | Path,
    output: str | Path,
    dtype: str | None = None,
    *,
    tokenizer: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint as a GGUF file; it appears after its logits were checked.

    Args:
        checkpoint: dsmoe model folder, or folder of a finished run.
        output: file to write, named *.gguf.
        dtype: of the matrices, one of GGUF_DTYPES (norms and routers are float32); None: the checkpoint's.
        tokenizer: store the checkpoint's tokenizer, if it has one.
        overwrite: replace a file.

    Returns:
        The report.

    Raises:
        UserError: llama.cpp cannot hold the model or its tokenizer, or the file differs from them; nothing is written
            then.
    """
    output = Path(output)
    if dtype is not None and dtype not in GGUF_DTYPES:
        raise UserError(f"dtype {dtype!r}: must be one of {', '.join(GGUF_DTYPES)}")
    if output.suffix != SUFFIX or output.is_dir():
        raise UserError(f"{output}: `--format gguf` writes one file; name it MODEL{SUFFIX}")
    if output.exists() and not overwrite:
        raise UserError(f"{output}: the file exists; name another one or pass --overwrite")
    gguf = _package()
    model, source = load_pretrained(checkpoint, torch.float32)
    architecture = gguf_architecture(model.config)
    vocabulary = read_vocabulary(source, model.config) if tokenizer else None
    if dtype is None:
        dtype = stored_dtype(source)
    beside = output.with_name(f".{output.stem}.{uuid.uuid4().hex[:8]}.tmp{SUFFIX}")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write(gguf, beside, model, architecture, dtype, vocabulary, source)
        agreement, engine = _check(gguf, beside, model, architecture, dtype, vocabulary)
        size = beside.stat().st_size
        beside.replace(output)
    finally:
        beside.unlink(missing_ok=True)
    return {
        "format": "gguf",
        "architecture": architecture,
        "dtype": dtype,
        "bytes": size,
        "source_config_sha256": sha256(source / "config.json"),
        "dsmoe_version": __version__,
        "tokenizer": None
        if vocabulary is None
        else {"pre": vocabulary.pre, "tokens": len(vocabulary.tokens)},
        **asdict(agreement),
        "llama_cpp": None if engine is None else asdict(engine),
        "notes": gguf_notes(model.config, architecture, dtype, vocabulary, engine),
    }


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("`--format gguf` needs the package gguf: pip install gguf") from None
    return gguf


def _write(
    gguf: Any,
    path: Path,
    model: Any,
    architecture: str,
    dtype: str,
    vocabulary: Vocabulary | None,
    source: Path,
) -> None:
    # folded in float32; rounded once, on the way into the file; llama.cpp takes experts of any width
    target = target_model(model, architecture, torch.float32, untie=True, pad=False)
    writer = gguf.GGUFWriter(path, architecture)
    file_types = {"float32": "ALL_F32", "bfloat16": "MOSTLY_BF16", "float16": "MOSTLY_F16"}
    writer.add_type("model")
    writer.add_file_type(gguf.LlamaFileType[file_types[dtype]])
    writer.add_string("dsmoe.version", __version__)
    writer.add_string("dsmoe.source_config_sha256", sha256(source / "config.json"))
    add_hyper_parameters(writer, target.config)
    add_vocabulary(writer, vocabulary)
    add_tensors(writer, gguf, target, GGUF_DTYPES[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def _check(
    gguf: Any, path: Path, model: Any, architecture: str, dtype: str, vocabulary: Vocabulary | None
) -> tuple[Agreement, EngineReport | None]:
    config = model.config
    tokens_BS = check_tokens(config.vocab_size, config.max_position_embeddings)
    round_as_stored(model, GGUF_DTYPES[dtype])
    original = outputs_of(model, tokens_BS)
    read_back = outputs_of(read_gguf(gguf, path), tokens_BS)
    top_k = uniform_top_k(config, architecture) if config.num_experts > 1 else None
    agreement = compare(original, read_back, top_k)
    exact = is_exact(config, GGUF_DTYPES[dtype])
    require_agreement(agreement, EXACT if exact else ROUNDED, router_scale(original))
    # against what the file holds: the rounding after folding was judged above
    return agreement, check_engine(path, dtype, tokens_BS, read_back.logits, vocabulary)
