"""An export from end to end: load, refuse or convert, check, and only then let the folder appear."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dsmoe import __version__
from dsmoe.checkpoint.pretrained import DTYPES, load_pretrained, stored_dtype, write_pretrained
from dsmoe.errors import UserError
from dsmoe.export.check import (
    EXACT,
    ROUNDED,
    Agreement,
    check_default_experts,
    check_tokens,
    compare,
    load_exported,
    outputs_of,
    require_agreement,
    router_scale,
)
from dsmoe.export.gguf import export_gguf
from dsmoe.export.notes import LOOP, notes_of
from dsmoe.export.requirements import ARCHITECTURES, check_exportable, uniform_top_k
from dsmoe.export.targets import is_exact, rows_are_aligned, target_model
from dsmoe.files import check_new_folder, new_folder, sha256, write_json
from dsmoe.model import DSMoEForCausalLM

REPORT = "export.json"
# of the architectures that transformers ships: the check is for these
_SHIPPED_DTYPES = ("float32", "bfloat16")
# of `dsmoe sparsify`; true of a native copy as well
_CARRIED_ALONG = ("sparsity.json",)


def export(
    checkpoint: str | Path,
    target: str,
    output: str | Path,
    dtype: str | None = None,
    *,
    untie: bool = False,
    tokenizer: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint in another format; the folder appears after its logits were checked.

    Args:
        checkpoint: dsmoe model folder, or folder of a finished run.
        target: one of FORMATS.
        output: folder to write, or file (gguf).
        dtype: of the weights, one of DTYPES (float16: dsmoe and gguf alone); None: the checkpoint's, or float32 where
            the target can't have that.
        untie: store the output projection of a tied model beside its embedding table (gguf does so always).
        tokenizer: false: leave the tokenizer out (gguf alone).
        overwrite: replace a folder that is not empty, or a file.

    Returns:
        The report, which also stands in the folder's export.json.

    Raises:
        UserError: the target cannot hold the model, or the export differs from it; nothing is written then.
    """
    if target == "gguf":
        return export_gguf(checkpoint, output, dtype, tokenizer=tokenizer, overwrite=overwrite)
    output = Path(output)
    if not tokenizer:
        raise UserError("--no-tokenizer is for `--format gguf`")
    dtypes = tuple(DTYPES) if target == "dsmoe" else _SHIPPED_DTYPES
    if dtype is not None and dtype not in dtypes:
        raise UserError(f"dtype {dtype!r}: must be one of {', '.join(dtypes)}")
    if untie and target == "dsmoe":
        raise UserError("--untie is for the other formats; dsmoe keeps the model's own tying")
    # the model of a run's folder is in final/
    check_new_folder(output, overwrite=overwrite, inputs=(checkpoint, Path(checkpoint) / "final"))
    model, source = load_pretrained(checkpoint, torch.float32)
    check_exportable(model.config, target)
    if dtype is None:
        own = stored_dtype(source)
        dtype = own if own in dtypes else "float32"
    with new_folder(output, overwrite=overwrite) as beside:
        _write(model, target, DTYPES[dtype], untie, source, beside)
        agreement, notes = _check(model, target, DTYPES[dtype], beside)
        report = {
            "format": target,
            "architecture": ARCHITECTURES[target],
            "dtype": dtype,
            "source_config_sha256": sha256(source / "config.json"),
            "dsmoe_version": __version__,
            **asdict(agreement),
            "notes": notes_of(model.config, target, DTYPES[dtype], untie) + notes,
        }
        write_json(beside / REPORT, report)
    return report


def _write(model: Any, target: str, dtype: torch.dtype, untie: bool, source: Path, folder: Path) -> None:
    """Write the folder's files; the model's own weights are rounded to `dtype` (in float32) afterwards."""
    if target == "dsmoe":
        write_pretrained(model.to(dtype), folder, source)
        for name in _CARRIED_ALONG:
            if (source / name).exists():
                shutil.copy(source / name, folder / name)
    else:
        write_pretrained(target_model(model, target, dtype, untie), folder, source, shim=False)
        model.to(dtype)
    # the model has no buffers that a cast would spoil
    model.float()


def _check(
    model: DSMoEForCausalLM, target: str, dtype: torch.dtype, folder: Path
) -> tuple[Agreement, list[str]]:
    """How near the folder is to the model, and notes on what did not run."""
    config = model.config
    tokens_BS = check_tokens(config.vocab_size, config.max_position_embeddings)
    original = outputs_of(model, tokens_BS)
    exported = outputs_of(load_exported(folder), tokens_BS)
    native = target != "dsmoe"
    top_k = uniform_top_k(config, target) if native and config.num_experts > 1 else None
    agreement = compare(original, exported, top_k)
    exact = not native or is_exact(config, dtype)
    require_agreement(agreement, EXACT if exact else ROUNDED, router_scale(original))
    notes = []
    if target in ("olmoe", "qwen2moe"):
        problem = check_default_experts(folder, dtype, tokens_BS, top_k)
        # a hidden size that it can't take has a note of its own
        if problem is not None and rows_are_aligned(config, dtype):
            notes.append(f"transformers' default experts don't run on this machine ({problem}); {LOOP}")
    return agreement, notes
