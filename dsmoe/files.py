"""Files appear whole or not at all: they are written beside their place and renamed into it."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from dsmoe.errors import UserError


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically (UTF-8), creating its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        with beside.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file atomically, with two spaces of indentation and a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from None


class _OneOfEachKey(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which PyYAML would silently keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # here and not where the mapping is made: there the keys that `<<` merges in stand among its own
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    problem = f"the key {key.value!r} stands twice in one mapping; rename or remove one"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add((key.tag, key.value))
        return node


def load_yaml(path: str | Path) -> Any:
    """Read a YAML file; None for an empty one.

    Raises:
        UserError: the file can't be read, is no YAML in UTF-8, or names a key twice in one mapping.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as handle:
            return yaml.load(handle, Loader=_OneOfEachKey)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a YAML file") from None
    except yaml.MarkedYAMLError as error:
        words = ", ".join(filter(None, [error.context, error.problem]))
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{path}: {line}{words}") from None
    # a ValueError is text that isn't UTF-8, or a date such as 2024-13-01
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}; give a YAML file in UTF-8") from None


def check_new_folder(path: str | Path, *, overwrite: bool = False, inputs: Iterable[str | Path] = ()) -> None:
    """Refuse a place where `new_folder` could not write, or would remove what is read; commands ask before they work.

    Args:
        path: where the folder will stand.
        overwrite: as in `new_folder`.
        inputs: files and folders that are read; those that are not there are passed over.

    Raises:
        UserError: `path` is a file, is not empty while `overwrite` is false, or is or holds an input or (given as a
            relative path) the current folder.
    """
    path = Path(path)
    place = path.resolve()
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file, and a folder is to be written there")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise UserError(f"{path}: the folder is not empty; name another one or pass --overwrite")
    for given in map(Path, inputs):
        if given.exists() and place in _places(given):
            raise UserError(f"{path}: is or holds {given}, which is read; name another folder")
    # the shell that started this would be left in a folder that is no more
    if not path.is_absolute() and place in _places(Path.cwd()):
        raise UserError(
            f"{path}: is or holds the current folder, which can't be replaced; name another folder"
        )


def check_new_file(path: str | Path, option: str) -> None:
    """Refuse a place where no file can be written; commands ask before they work.

    Args:
        path: where the file will stand; one that stands there is replaced.
        option: what to call it in an error, such as "--json".

    Raises:
        UserError: `path` is a folder, or a file or a folder that can't be written to is where its own would be.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; name a file")
    folder = next(one for one in path.absolute().parents if one.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{option} {path}: {folder} is no folder that can be written to; name another place")


def _places(path: Path) -> set[Path]:
    """A path and the folders that hold it: those it is reached by, and those it stands in once links are followed."""
    path = path.absolute()
    return {one.resolve() for one in (path, *path.parents)} | set(path.resolve().parents)


@contextmanager
def new_folder(
    path: str | Path, *, overwrite: bool = False, inputs: Iterable[str | Path] = ()
) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that becomes `path` when the block ends without an error.

    Args:
        path: where the folder will stand; where it is a link to a folder, that folder is replaced.
        overwrite: replace an existing, non-empty folder instead of refusing it.
        inputs: files and folders that are read and must not be replaced.

    Raises:
        UserError: as `check_new_folder`.
    """
    check_new_folder(path, overwrite=overwrite, inputs=inputs)
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    beside.mkdir()
    try:
        yield beside
        publish_folder(beside, path)
    finally:
        if beside.exists():
            shutil.rmtree(beside)


def publish_folder(folder: Path, path: Path) -> None:
    """Give a finished folder its name, on the disk too; what stood there before goes when it does.

    Args:
        folder: the folder, on the file system of `path`.
        path: where it is to stand (no link).
    """
    # a file that is written after this one, and says that it is there, must not outlive it
    for inside in (folder, *(found for found in folder.rglob("*") if found.is_dir())):
        sync_folder(inside)
    if path.exists():
        old = _beside(path)
        path.rename(old)
        try:
            folder.rename(path)
        except BaseException:
            old.rename(path)
            raise
        shutil.rmtree(old)
    else:
        folder.rename(path)
    sync_names(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the files in a folder, and their names, to the disk."""
    for path in folder.iterdir():
        if path.is_file():
            _sync(path)
    sync_names(folder)


def sync_names(folder: Path) -> None:
    """Bring the names in a folder to the disk, on systems where a folder can be opened for that."""
    try:
        _sync(folder)
    except (PermissionError, IsADirectoryError):  # Windows
        return


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
