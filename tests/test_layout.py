"""The shape of the repository: import directions, sizes of modules, what stands at the top."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = (
    {"errors"},
    {"files", "environment", "allocator", "figures", "lock", "spread"},
    *(
        {name}
        for name in [
            "records",
            "config",
            "accounting",
            "planner",
            "data",
            "model",
            "losses",
            "optim",
            "checkpoint",
            "trainer",
            "sparsify",
            "export",
            "convert",
            "serving",
            "evaluation",
            "bench",
            "study",
            "report",
            "cli",
        ]
    ),
)
LEVELS = {name: level for level, names in enumerate(ORDER) for name in names}
MODULES = sorted((ROOT / "dsmoe").rglob("*.py"))
SCRIPTS = sorted(path for folder in ("train", "eval") for path in (ROOT / folder).glob("*.py"))


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imported(path):
    """Every imported module of a file by its full name, wherever in the file the import stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import in line {node.lineno}"
            # `from dsmoe import files` is the package files; `from dsmoe import __version__` is dsmoe itself
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def packages_of_ours(path):
    parts = [name.split(".") for name in imported(path)]
    return {words[1] for words in parts if words[0] == "dsmoe" and len(words) > 1 and words[1] in LEVELS}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_left(path):
    own = path.relative_to(ROOT / "dsmoe").parts[0].removesuffix(".py")
    if own == "__init__":
        return
    assert own in LEVELS, f"{own} has no place in the order of packages"
    for package in packages_of_ours(path):
        assert package == own or LEVELS[package] < LEVELS[own], f"{own} imports {package}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 320


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_are_thin(path):
    for name in imported(path):
        top = name.split(".")[0]
        assert top == "dsmoe" or top in sys.stdlib_module_names, f"imports {name}"


@pytest.mark.parametrize(
    ("package", "banned"),
    [
        ("model", {"accelerate", "json", "pathlib"}),
        ("losses", {"accelerate", "json", "pathlib", "transformers"}),
        ("accounting", {"torch", "transformers", "accelerate"}),
        ("planner", {"torch", "transformers", "accelerate"}),
        ("config", {"torch", "accelerate"}),
    ],
)
def test_packages_know_little(package, banned):
    for path in sorted((ROOT / "dsmoe" / package).rglob("*.py")):
        if "kernels" in path.parts:
            continue  # the C++ kernel is built in a folder
        assert not {name.split(".")[0] for name in imported(path)} & banned, name_of(path)


def test_top_level():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    expected = {"setup.py", "dsmoe", "train", "eval", "configs", "tests", "README.md", "LICENSE", "setup.cfg"}
    assert {name for name in top if not name.startswith(".")} == expected
