"""Runs from a CSV file by a mapping of its columns."""

import csv
import gzip
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dsmoe.errors import UserError
from dsmoe.planner.fit.runs import KINDS, Run, checked

FIELDS = ("kind", "num_experts", "num_params_active", "num_params_total", "tokens", "loss", "name", "seed")


def read_table(
    path: Path,
    mapping: Mapping[str, str] | None = None,
    where: Mapping[str, Sequence[str]] | None = None,
    last_of: str | None = None,
    skip_empty: bool = False,
) -> tuple[list[Run], list[str]]:
    """Read runs from a CSV file (also gzipped), one a row.

    Args:
        path: the file.
        mapping: field of `Run` to a column, a number, or a sum of products of those ("step*524288", "N + 32000*d");
            fields that are left out have columns of their own name. Without `kind`, a run with one expert is dense and
            any other an SMoE.
        where: column to the values that a row must have to be read.
        last_of: column that names a run in a table with several rows per run: of each run the row with most tokens.
        skip_empty: leave out rows without a loss (and say how many) instead of refusing them.

    Returns:
        The runs, and notes on what was assumed.

    Raises:
        UserError: no such file or column, or a value that is not a positive number; the message names the row.
    """
    mapping = dict(mapping or {})
    unknown = [name for name in mapping if name not in FIELDS]
    if unknown:
        raise UserError(f"--map {unknown[0]}={mapping[unknown[0]]}: the fields are {', '.join(FIELDS)}")
    runs, keys, notes, empty = [], [], set(), 0
    loss = mapping.get("loss", "loss")
    for number, row in _rows(path):
        place = f"{path}, row {number}"
        if any(_cell(row, column, path) not in values for column, values in (where or {}).items()):
            continue
        if skip_empty and not _cell(row, loss, path).strip():
            empty += 1
            continue
        run, assumed = _run(row, mapping, path, place)
        runs.append(run)
        keys.append(_cell(row, last_of, path) if last_of else str(number))
        notes.update(assumed)
    if not runs:
        raise UserError(f"{path}: no row{' fits --where' if where else ''}; at least one run is needed")
    if empty:
        notes.add(f"{path.name}: {empty} rows without a loss were left out")
    last: dict[str, Run] = {}
    for key, run in zip(keys, runs):
        if key not in last or run.tokens > last[key].tokens:
            last[key] = run
    return list(last.values()), sorted(notes)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        # Excel starts a file with a byte order mark, which would become part of the first column's name
        with opener(path, "rt", encoding="utf-8-sig", newline="") as handle:
            table = csv.DictReader(handle)
            _check_names(table.fieldnames or (), path)
            yield from enumerate(table, start=2)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file ({error})") from None


def _check_names(columns: Sequence[str], path: Path) -> None:
    """Refuse " Kind" for "kind": fields that may be left out would be missing without a word, and a DS-MoE be an SMoE."""
    for column in columns:
        meant = column.strip().lower()
        if meant in FIELDS and column != meant and meant not in columns:
            raise UserError(f"{path}: column {column!r} must be named {meant!r}, without capitals or spaces")


def _cell(row: Mapping[str, str], column: str, path: Path) -> str:
    if column not in row:
        raise UserError(f"{path}: no column {column!r}; it has {', '.join(str(name) for name in row)}")
    return row[column] or ""


def _number(row: Mapping[str, str], expression: str, field: str, path: Path, place: str) -> float:
    """A sum of products of columns and numbers; a column may itself be named with a + or a *."""
    if expression in row:
        value = _factor(row, expression, field, path, place)
    else:
        products = [term.split("*") for term in expression.split("+")]
        value = sum(
            math.prod(_factor(row, factor.strip(), field, path, place) for factor in product)
            for product in products
        )
    if not math.isfinite(value) or value <= 0:
        raise UserError(f"{place}: {field} ({expression}) is {value:g}; it must be a finite number above 0")
    return value


def _factor(row: Mapping[str, str], factor: str, field: str, path: Path, place: str) -> float:
    text = factor if factor not in row and _is_number(factor) else _missing_named(row, factor, field, path)
    if not _is_number(text):
        raise UserError(f"{place}: {field} ({factor}) is {text!r}; it must be a number above 0")
    return float(text)


def _missing_named(row: Mapping[str, str], column: str, field: str, path: Path) -> str:
    if column not in row:
        raise UserError(
            f"{path}: no column {column!r} for {field}; it has {', '.join(str(name) for name in row)} "
            f"(name one with --map {field}=COLUMN)"
        )
    return row[column] or ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _run(row: Mapping[str, str], mapping: Mapping[str, str], path: Path, place: str) -> tuple[Run, list[str]]:
    def number(field: str) -> float:
        return _number(row, mapping.get(field, field), field, path, place)

    def given(field: str) -> bool:
        return field in mapping or field in row

    experts = number("num_experts") if given("num_experts") else 1.0
    kind = mapping.get("kind", "kind")
    if kind in row:
        kind = _cell(row, kind, path).strip().lower()
    elif kind not in KINDS:
        if "kind" in mapping:
            _missing_named(row, kind, "kind", path)
        kind = "dense" if experts == 1 else "smoe"
    notes = []
    if not given("kind") and not given("num_experts"):
        notes.append(f"{path.name} has neither kind nor num_experts: all its runs count as dense")
    if kind == "dsmoe":
        total = number("num_params_total")
        active = number("num_params_active") if given("num_params_active") else total
    else:
        active = number("num_params_active")
        total = number("num_params_total") if given("num_params_total") else active
        if kind == "smoe" and not given("num_params_total"):
            notes.append(f"{path.name} has no num_params_total: SMoEs are ordered by their active parameters")
    run = Run(
        kind=kind,
        num_experts=experts,
        num_params_active=active,
        num_params_total=total,
        tokens=number("tokens"),
        loss=number("loss"),
        name=_cell(row, mapping.get("name", "name"), path) if given("name") else place,
        seed=_seed(row, mapping, path, place) if given("seed") else 0,
    )
    return checked(run, place), notes


def _seed(row: Mapping[str, str], mapping: Mapping[str, str], path: Path, place: str) -> int:
    text = _missing_named(row, mapping.get("seed", "seed"), "seed", path)
    if not _is_number(text):
        raise UserError(f"{place}: seed is {text!r}; it must be a whole number")
    return int(float(text))
