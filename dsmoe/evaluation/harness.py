"""lm-eval's tasks on a model: the same numbers as its own command line, kept per question for pairing.

Zero-shot. `limit` takes the first questions of each task, as `lm_eval --limit` does. Accuracies agree with
`lm_eval --model hf` for the same dtype and batch size.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dsmoe.data.benchmarks import refresh_task_files
from dsmoe.errors import UserError
from dsmoe.evaluation.loading import LoadedModel
from dsmoe.evaluation.quiet import quiet_harness

PAPER_TASKS = ("hellaswag", "piqa", "winogrande", "sciq", "arc_easy", "arc_challenge")
METRICS = ("acc", "acc_norm")
_LOCAL = "_local"


def parse_tasks(text: str) -> list[str]:
    """Task names from `--tasks`: "paper" (the six of arXiv 2404.05567) and lm-eval names, comma-separated.

    Raises:
        UserError: no name, or one twice.
    """
    names: list[str] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        names.extend(PAPER_TASKS if name == "paper" else [name])
    if not names:
        raise UserError(f"--tasks {text!r}: names no task; give 'paper' or names such as 'piqa,sciq'")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--tasks {text!r}: {name} is named twice")
    return names


def score_model(
    loaded: LoadedModel,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    seed: int = 1234,
    label: str | None = None,
) -> dict[str, Any]:
    """Score a model on multiple-choice tasks.

    Args:
        loaded: the model.
        tasks: lm-eval names; one that has a `<name>_local` in `include_path` is taken from there.
        include_path: folder of task files, such as `dsmoe data benchmarks` writes; None: the Hub's data.
        limit: the first so many questions of each task; None: all.
        batch_size: requests a forward pass.
        max_length: longest input in tokens, cut on the left; None: the longest that the model's config allows, which can
            be more than it was trained on.
        seed: of Python, NumPy, torch and few-shot sampling (zero-shot choice draws nothing at random).
        label: the model's name on the progress bar.

    Returns:
        {"tasks": {task: {"acc", "stderr", "acc_norm", "acc_norm_stderr", "num_questions", "split"}},
        "questions": {task: {"ids": digest of the questions, "acc": "0110...", "acc_norm": ...}},
        "task_versions": {task: version}, "num_truncated": requests that were too long, cut on the left}.
        Tasks carry their plain names. A metric that a task lacks is null.

    Raises:
        UserError: an unknown task, data that cannot be reached, a task without accuracy, or an answer of more than
            `max_length` tokens.
    """
    results, num_truncated = _evaluate(
        loaded, tasks, include_path, limit, batch_size, max_length, seed, label
    )
    scored: dict[str, Any] = {
        "tasks": {},
        "questions": {},
        "task_versions": {},
        "num_truncated": num_truncated,
    }
    for name, samples in results["samples"].items():
        task = name.removesuffix(_LOCAL)
        metrics, config = results["results"][name], results["configs"][name]
        if metrics.get("acc,none") is None:
            raise UserError(f"task {task}: has no accuracy; only multiple-choice tasks can be scored here")
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        scored["tasks"][task] = {
            "acc": metrics["acc,none"],
            "stderr": _number(metrics.get("acc_stderr,none")),
            "acc_norm": metrics.get("acc_norm,none"),
            "acc_norm_stderr": _number(metrics.get("acc_norm_stderr,none")),
            "num_questions": len(samples),
            "split": config.get("test_split") or config.get("validation_split"),
        }
        scored["questions"][task] = _questions(samples)
        scored["task_versions"][task] = results["versions"].get(name)
    return scored


def wikitext(
    loaded: LoadedModel,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    seed: int = 1234,
    label: str | None = None,
) -> dict[str, float]:
    """lm-eval's "wikitext" (wikitext-2, test split), which needs the Hub.

    Args:
        loaded: the model.
        limit: the first so many documents; None: all.
        batch_size: windows a forward pass.
        max_length: as in `score_model`.
        seed: as in `score_model`.
        label: the model's name on the progress bar.

    Returns:
        {"word_perplexity", "byte_perplexity", "bits_per_byte"}.

    Raises:
        UserError: the data cannot be reached.
    """
    results, _ = _evaluate(loaded, ["wikitext"], None, limit, batch_size, max_length, seed, label)
    metrics = results["results"]["wikitext"]
    return {
        key: float(metrics[f"{key},none"]) for key in ("word_perplexity", "byte_perplexity", "bits_per_byte")
    }


def _evaluate(
    loaded: LoadedModel,
    tasks: Sequence[str],
    include_path: str | Path | None,
    limit: int | None,
    batch_size: int,
    max_length: int | None,
    seed: int,
    label: str | None,
) -> tuple[Any, int]:
    from lm_eval import simple_evaluate

    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: must be a number of questions, at least 1")
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: must be at least 1")
    if include_path is not None:
        refresh_task_files(include_path)
    with quiet_harness() as truncated:
        manager, names = _resolve(tasks, include_path)
        scorer = _scorer(loaded, batch_size, max_length, label or Path(loaded.path).name)
        try:
            results = simple_evaluate(
                model=scorer,
                tasks=names,
                batch_size=batch_size,
                device=str(loaded.model.device),
                limit=limit,
                log_samples=True,
                task_manager=manager,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except OSError as error:  # also what the Hub's clients and datasets raise when data cannot be had
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"tasks {', '.join(names)}: their data cannot be read ({reason}); without the Hub, make "
                "local tasks with `dsmoe data benchmarks --output DIR` and pass --include-path DIR"
            ) from error
    return results, truncated.count


def _resolve(tasks: Sequence[str], include_path: str | Path | None) -> tuple[Any, list[str]]:
    """A task manager, and the names of the tasks in it: `<name>_local` where the include path has one."""
    from lm_eval.tasks import TaskManager

    local = set()
    manager = None
    if include_path is not None:
        # without lm-eval's own 10,000 task files an index takes milliseconds, with them seconds
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        local = set(manager.all_tasks)
    names = [task + _LOCAL if task + _LOCAL in local else task for task in tasks]
    if manager is None or not set(names) <= local:
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        raise UserError(f"--tasks: lm-eval knows no task {unknown[0]!r}; `lm_eval ls tasks` lists them")
    return manager, names


def _scorer(loaded: LoadedModel, batch_size: int, max_length: int | None, label: str) -> Any:
    """lm-eval's HFLM with one progress bar that counts answers."""
    from lm_eval.models.huggingface import HFLM

    class Progress:
        """Stands in for the cache that HFLM tells of each answer."""

        def __init__(self, bar: tqdm) -> None:
            self.bar = bar

        def add_partial(self, *_: Any) -> None:
            self.bar.update(1)

    class Scorer(HFLM):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with tqdm(total=len(requests), desc=label, unit="answer", disable=None) as bar:
                self.cache_hook = Progress(bar)
                return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> Any:
            _check_answers_fit(requests, self.max_length, context)
            # of a rolling likelihood HFLM would show a bar for each batch of windows
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    context = getattr(loaded.model.config, "max_position_embeddings", None)
    if max_length is not None and context is not None:
        max_length = min(max_length, context)
    return Scorer(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        batch_size=batch_size,
        max_length=max_length,
        device=str(loaded.model.device),
    )


def _check_answers_fit(requests: Sequence[Any], max_length: int, context: int | None) -> None:
    """HFLM cuts contexts to fit; of an answer that doesn't fit by itself it only asserts that there is none."""
    longest = max((len(answer) for _, _, answer in requests), default=0)
    if longest <= max_length:
        return
    found = f"the longest answer of these tasks has {longest} tokens, and answers are never cut"
    if context is not None and longest > context:
        raise UserError(f"--tasks: {found}; the model's context is {context}, so leave out the task with it")
    raise UserError(f"--max-length {max_length}: {found}; give at least {longest}")


def _questions(samples: Sequence[Any]) -> dict[str, str]:
    """Per-question outcomes, one digit each, and a digest of the questions: only equal ones can be paired.

    A metric that is not right or wrong, such as a probability, has none and is never paired.
    """
    ids = hashlib.sha256("\n".join(sample["doc_hash"] for sample in samples).encode()).hexdigest()
    questions = {"ids": ids}
    for metric in METRICS:
        if all(sample.get(metric) in (0, 1) for sample in samples):
            questions[metric] = "".join(str(int(sample[metric])) for sample in samples)
    return questions


def _number(value: Any) -> float | None:
    # lm-eval writes "N/A" where there is no standard error
    return float(value) if isinstance(value, int | float) else None
