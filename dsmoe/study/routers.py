"""How the routers of a study's runs went: are experts used alike, and does each token choose?"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# what a record keeps of the statistics in a run's log: two numbers a layer
KEPT_STATISTICS = ("entropy", "conditional_entropy")

Course = list[tuple[int, float, float]]


def shortened(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of a run's log without the routers' long statistics."""
    routers = line.get("router")
    if routers is None:
        return dict(line)
    kept = {
        part: {
            name: [round(value, 4) for value in values[name]] for name in KEPT_STATISTICS if name in values
        }
        for part, values in routers.items()
    }
    return {**line, "router": kept}


def router_courses(lines: Iterable[str], runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Course]]:
    """Balance and choice along training, from 0 to 1 and as means over layers.

    Args:
        lines: of a record's logs.jsonl.
        runs: the study's results; of each point only the first seed is followed.

    Returns:
        Part ("mlp", "attention") -> name of the run -> (tokens, H(mean p) / log N, mean H(p) / log N) of each line. The
        first is 1 where all experts get the same probability over the batch, and falls when routers collapse onto few;
        the second is 1 where no token prefers an expert, 0 where each chooses one.
    """
    followed: dict[tuple[str, ...], str] = {}
    for run in runs:
        followed.setdefault((run["group"], *run["labels"].values()), run["name"])
    num_experts = {
        run["name"]: _num_experts(run.get("model", {})) for run in runs if run["name"] in followed.values()
    }
    found: dict[str, dict[str, Course]] = {}
    for text in lines:
        line = json.loads(text)
        if line["run"] not in num_experts:
            continue
        for part, values in line.get("router", {}).items():
            most = math.log(num_experts[line["run"]].get(part, 1))
            # logs of older versions' records are without
            if most > 0 and all(values.get(name) for name in KEPT_STATISTICS):
                shares = [sum(values[name]) / len(values[name]) / most for name in KEPT_STATISTICS]
                found.setdefault(part, {}).setdefault(line["run"], []).append((line["tokens"], *shares))
    return found


def _num_experts(model: Mapping[str, Any]) -> dict[str, int]:
    return {"mlp": model.get("num_experts", 1), "attention": model.get("num_attention_experts", 1)}
