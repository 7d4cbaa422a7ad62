"""A page about a law: loss against memory, iso-FLOP curves, and where DS-MoE wins as inference demand grows."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsmoe.accounting import markdown_table
from dsmoe.environment import versions
from dsmoe.errors import run_reporting_errors
from dsmoe.files import new_folder, write_json, write_text
from dsmoe.planner.figures import CONTEXT, MEMORIES, figure_inference, figure_isoflop, figure_memory, window
from dsmoe.planner.lawfile import PlanningLaw, read_law
from dsmoe.planner.units import format_count, parse_flops

EPILOG = """examples:
  python eval/plan_page.py --output eval/records/planner
  python eval/plan_page.py --law law.json --flops 1e18,1e19,1e20 --output pages/own-law"""


def write_page(law: PlanningLaw, budgets: Sequence[float], output: Path, overwrite: bool = False) -> None:
    """Write the page's folder: README.md, three PNGs, page.json."""
    with new_folder(output, overwrite=overwrite) as folder:
        largest = max(budgets)
        content = {
            "law": law.name,
            "versions": versions(),
            "rmse": law.rmse,
            "eta": law.fit.term.eta,
            "eta_fitted": law.fit.term.fitted,
            "context_length": CONTEXT,
            "dtype": "bf16",
            "memory": figure_memory(law, budgets, folder / "loss_against_memory.png"),
            "isoflop": figure_isoflop(
                law,
                sorted({float(f"{b:.6g}") for b in (*budgets, *(b / 100 for b in budgets))}),
                folder / "isoflop.png",
            ),
            "inference": figure_inference(
                law, largest, 24 * window(largest), folder / "inference_demand.png"
            ),
        }
        write_json(folder / "page.json", _rounded(content))
        write_text(folder / "README.md", _readme(content, budgets))


def _readme(content: dict[str, Any], budgets: Sequence[float]) -> str:
    rows = []
    for flops in budgets:
        cells = {cell["memory_gb"]: _cell(cell) for cell in content["memory"][f"{flops:g}"]["best"]}
        rows.append([f"{flops:g}", *(cells.get(size, "nothing fits") for size in MEMORIES)])
    table = markdown_table(["FLOPs", *(f"{name}, {size} GB" for size, name in MEMORIES.items())], rows)
    wins = "\n".join(_wins(entry) for entry in content["inference"]["maps"])
    state = "fitted" if content["eta_fitted"] else "ASSUMED, not measured"
    return f"""# What the law says: {content["law"]}

Made by `python eval/plan_page.py`; numbers in `page.json`. Sizes are the exact optima over real (not whole) hidden sizes.
bf16, KV cache of {content["context_length"]:,} tokens. Differences within the tie band can't be told apart.

## Loss against memory at a fixed training budget

{table}

x: extrapolated, beyond the runs that the law was fitted to. In brackets: ties. In the figure a dot ends a line where
more memory stops helping, and stars are the best of each device.

![loss against memory](loss_against_memory.png)

## Iso-FLOP curves

![iso-FLOP curves](isoflop.png)

## Where DS-MoE wins as inference demand grows

{content["inference"]["flops"]:g} FLOPs for training and inference together. A DS-MoE trains all of its parameters
(6 N_total per token), runs the active ones (2 N_active) and has the loss of a dense model of eta x N_total
(eta {state}). It has the lowest loss:

{wins}

With eta = 1 a DS-MoE is a dense model with cheaper inference and can't be worse than the dense one, so only a lead
beyond the tie band says something. It gains on SMoE where memory is tight (SMoE spends it on experts that are idle)
and inference demand is large.

![inference demand](inference_demand.png)
"""


def _wins(entry: dict[str, Any]) -> str:
    """Where DS-MoE has the lowest loss on one map, as a list item."""
    cells = entry["cells"]
    wins = [cell for cell in cells if cell["kind"] == "dsmoe"]
    start = f"- eta {entry['eta']:.3g}: in {len(wins)} of {len(cells)} cells of the map"
    if not wins:
        return start
    memories = [cell["memory_gb"] for cell in wins]
    return (
        f"{start} ({min(memories):.0f} to {max(memories):.0f} GB, "
        f"from {format_count(min(cell['inference_tokens'] for cell in wins))} inference tokens on), "
        f"in {sum(not cell['ties'] for cell in wins)} of them by more than the tie band"
    )


def _rounded(value: Any) -> Any:
    """Floats to seven digits, which is more than a figure shows."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list | tuple) else value


def _cell(cell: dict[str, Any]) -> str:
    return (
        cell["best"]
        + (" x" if cell["extrapolated"] else "")
        + (f" ({', '.join(cell['ties'])})" if cell["ties"] else "")
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `eval/plan_page.py`; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--law", help="joint (default), tabulated, or a JSON file of `dsmoe fit`")
    parser.add_argument("--flops", default="1e21,1e22,1e23", help="training budgets (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is not empty")
    args = parser.parse_args(argv)

    def write() -> None:
        budgets = [parse_flops(word) for word in args.flops.split(",")]
        write_page(read_law(args.law), budgets, args.output, args.overwrite)
        print(f"written to {args.output}")

    return run_reporting_errors(write)
