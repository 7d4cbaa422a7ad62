"""DS-MoE: mixture-of-experts language models that are trained densely and run sparsely.

Importing the package registers the architecture, so that AutoConfig, AutoModel and AutoModelForCausalLM load its
checkpoints. The console command alone does that later, in the subcommands that need it: loading torch takes seconds,
and `dsmoe plan` answers without it.
"""

import importlib
import sys
from pathlib import PurePath
from typing import Any

__version__ = "0.1.0"
__all__ = ["DSMoEConfig", "DSMoEForCausalLM", "DSMoEModel"]

_HOMES = {
    "DSMoEConfig": "dsmoe.config",
    "DSMoEForCausalLM": "dsmoe.model",
    "DSMoEModel": "dsmoe.model",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dsmoe' has no attribute {name!r}")


def _is_console_command() -> bool:
    """Whether this process is the installed script `dsmoe` (which enters through `dsmoe.cli`)."""
    return bool(sys.argv) and PurePath(sys.argv[0]).stem == "dsmoe"


if not _is_console_command():
    from dsmoe.model.auto import register

    register()
