"""A study as a YAML file: groups of runs, each a grid of settings and seeds over one base recipe.

```yaml
name: scaling
title: What was measured, in a line      # for the record
conclusion: What it showed               # for the record, written afterwards
config: configs/scaling/base.yaml        # a recipe of train/pretrain.py, relative to this file or the present folder
settings: {data.path: data/scaling}      # settings of every run, by their dotted names
groups:
  dense:
    settings: {model.kind: dense, model.num_experts: 1}
    grid:                                # axes; the runs are their product
      size:
        small: {model.hidden_size: 64}
        large: {model.hidden_size: 128}
      tokens:
        1M: {train.total_tokens: 1000000}
    seeds: [0, 1]                        # or seeds of each point of an axis: {1M: [0, 1]}
pairs: [[dsmoe, dense]]                  # two groups, compared where axes and seeds agree; or two points, such as
                                         # [dsmoe-small-1M, dense-small-2M], compared where seeds agree
also: [eval/records/quality-largest]     # records of other studies, whose runs of the same settings and the same text
                                         # needn't be trained again for this one's; relative as `config` is
curves:                                  # a pair's difference against what grows (tokens or parameters), with a line
  - {pair: [dsmoe, dense], against: parameters, points: [small, large]}
```

A run is called `dense-small-1M-s0`.
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsmoe.errors import UserError
from dsmoe.files import load_yaml
from dsmoe.study.curves import AXES, Curve

KEYS = {"name", "title", "conclusion", "config", "settings", "groups", "pairs", "curves", "also"}
# the study says these of each run; a setting of them would be silently set aside
OWN_SETTINGS = (
    "train.seeds", "train.output_dir", "train.resume", "train.overwrite", "mask_phase.dense_stage",
)  # fmt: skip
GROUP_KEYS = {"settings", "grid", "seeds"}
CURVE_KEYS = {"pair", "against", "points"}


@dataclass(frozen=True)
class StudyRun:
    """One training run of a study.

    Args:
        name: unique; also its folder.
        group: the group that it belongs to.
        labels: the name of its point on each axis.
        seed: of weights.
        settings: by dotted name, over the base recipe.
    """

    name: str
    group: str
    labels: dict[str, str]
    seed: int
    settings: dict[str, Any]

    @property
    def point(self) -> str:
        """What the runs of all seeds have in common: group and labels."""
        return "-".join([self.group, *self.labels.values()])


@dataclass(frozen=True)
class Study:
    """A whole study.

    Args:
        name: what to call it.
        config: the base recipe; None: defaults.
        runs: in the order in which they are run.
        pairs: (first, second) groups, or points, to compare.
        title: of its record.
        conclusion: of its record.
        curves: pairs of groups to follow along tokens or size.
        also: folders of other studies' records, see `dsmoe.study.kept`.
    """

    name: str
    config: Path | None
    runs: list[StudyRun]
    pairs: list[tuple[str, str]] = field(default_factory=list)
    title: str = ""
    conclusion: str = ""
    curves: list[Curve] = field(default_factory=list)
    also: list[Path] = field(default_factory=list)


def read_study(path: str | Path) -> Study:
    """Read a study.

    Raises:
        UserError: no such file, not YAML, an unknown key, a missing part; the message names the place.
    """
    path = Path(path)
    study = _mapping(load_yaml(path), str(path), KEYS)
    groups = _mapping(study.get("groups"), f"{path}: groups")
    if not groups:
        raise UserError(f"{path}: groups is empty; a study needs at least one group of runs")
    shared = _settings(study.get("settings"), f"{path}: settings")
    runs: list[StudyRun] = []
    for name, group in groups.items():
        runs += _group_runs(
            str(name), _mapping(group, f"{path}: groups.{name}", GROUP_KEYS), shared, str(path)
        )
    _check_names([run.name for run in runs], path)
    return Study(
        name=str(study.get("name", path.stem)),
        config=_recipe(study.get("config"), path),
        runs=runs,
        pairs=_pairs(study.get("pairs"), runs, path),
        title=str(study.get("title", path.stem)),
        conclusion=" ".join(str(study.get("conclusion", "")).split()),
        curves=[
            _curve(curve, runs, f"{path}: curves") for curve in _list(study.get("curves"), f"{path}: curves")
        ],
        also=[_record(record, path) for record in _list(study.get("also"), f"{path}: also")],
    )


def _check_names(names: list[str], path: Path) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: two runs are called {name!r}; rename a point of the grid")
        if "/" in name:
            raise UserError(
                f"{path}: a run is called {name!r}, which is no name of a folder; leave out the '/'"
            )


def _mapping(value: Any, place: str, known: set[str] | None = None) -> dict[str, Any]:
    value = {} if value is None else value
    if not isinstance(value, Mapping):
        raise UserError(f"{place} is {value!r}; it must be a mapping")
    unknown = sorted(set(value) - known, key=str) if known else []
    if unknown:
        raise UserError(f"{place}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known or ()))}")
    return dict(value)


def _settings(value: Any, place: str) -> dict[str, Any]:
    """Settings by dotted name, all of them such as JSON holds: a run's command line and study.json are written in it."""
    found = _mapping(value, place)
    for name, setting in found.items():
        if not isinstance(name, str):
            raise UserError(f"{place}: {name!r} is no dotted name, such as train.total_tokens")
        check_setting(name, place)
        try:
            json.dumps(setting)
        except (TypeError, ValueError):
            raise UserError(f"{place}.{name} is {setting!r}, which is no setting; quote a text") from None
    return found


def check_setting(name: str, place: str) -> None:
    """Refuse a setting that the study itself makes.

    Raises:
        UserError: it is one.
    """
    if name in OWN_SETTINGS:
        advice = "give the group's `seeds`" if name == "train.seeds" else "leave it out"
        raise UserError(f"{place}: {name} is set by the study itself; {advice}")


def _list(value: Any, place: str) -> list[Any]:
    if isinstance(value, list | None):
        return value or []
    raise UserError(f"{place} is {value!r}; it must be a list")


def _group_runs(name: str, group: dict[str, Any], shared: dict[str, Any], path: str) -> list[StudyRun]:
    place = f"{path}: groups.{name}"
    axes = {
        axis: _mapping(points, f"{place}.grid.{axis}")
        for axis, points in _mapping(group.get("grid"), f"{place}.grid").items()
    }
    for axis, points in axes.items():
        if not points:
            raise UserError(
                f"{place}.grid.{axis} has no points, so the group would have no runs; give one or more"
            )
    own = _settings(group.get("settings"), f"{place}.settings")
    _check_labels(group.get("seeds"), axes, f"{place}.seeds")
    runs = []
    for point in itertools.product(*axes.values()):
        labels = {axis: str(label) for axis, label in zip(axes, point)}
        settings = {**shared, **own}
        for axis, label in zip(axes, point):
            settings |= _settings(axes[axis][label], f"{place}.grid.{axis}.{label}")
        for seed in _seeds(group.get("seeds", [0]), list(labels.values()), f"{place}.seeds"):
            runs.append(
                StudyRun("-".join([name, *labels.values(), f"s{seed}"]), name, labels, seed, settings)
            )
    return runs


def _check_labels(seeds: Any, axes: Mapping[str, Mapping[Any, Any]], place: str) -> None:
    """Refuse seeds of a point that no axis has."""
    known = {str(label) for points in axes.values() for label in points}
    for label in seeds if isinstance(seeds, Mapping) else ():
        if str(label) not in known:
            raise UserError(
                f"{place} names {label!r}, which is no point of the grid ({', '.join(sorted(known)) or 'there is none'})"
            )


def _seeds(value: Any, labels: list[str], place: str) -> list[int]:
    """The seeds of a point: the group's, or where a mapping is given those of the one of its labels that is in it."""
    seeds = value
    if isinstance(value, Mapping):
        known = [label for label in map(str, value) if label in labels]
        if len(known) != 1:
            point = "-".join(labels)
            raise UserError(f"{place} names {len(known)} points of {point!r}; it must name one, or be a list")
        seeds = {str(label): own for label, own in value.items()}[known[0]]
    # type() and not isinstance: true is an int in Python
    fit = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    if not fit or not seeds or len(set(seeds)) < len(seeds):
        raise UserError(
            f"{place} is {seeds!r}; it must be a list of different integers from 0 to 2**32 - 1, such as [0, 1, 2]"
        )
    return seeds


def _recipe(config: Any, path: Path) -> Path | None:
    if config is None:
        return None
    if not isinstance(config, str):
        raise UserError(f"{path}: config is {config!r}; it must be the path of a recipe of train/pretrain.py")
    for folder in (path.parent, Path()):
        if (folder / config).is_file():
            _check_recipe(folder / config)
            return folder / config
    raise UserError(
        f"{path}: config {config!r} is no file, neither beside the study nor in the present folder"
    )


def _record(record: Any, path: Path) -> Path:
    for folder in (path.parent, Path()):
        if isinstance(record, str) and (folder / record / "results.json").is_file():
            return folder / record
    raise UserError(
        f"{path}: also names {record!r}, which holds no results.json of a study, neither beside the study nor in the "
        "present folder"
    )


def _check_recipe(path: Path) -> None:
    """Refuse what study.json couldn't hold; whether its settings fit is for the trainer to say."""
    try:
        json.dumps(load_yaml(path))
    except TypeError as problem:
        raise UserError(f"{path}: {problem}; quote what is a text") from None


def _pairs(pairs: Any, runs: list[StudyRun], path: Path) -> list[tuple[str, str]]:
    groups, points = {run.group for run in runs}, {run.point for run in runs}
    found = []
    for pair in _list(pairs, f"{path}: pairs"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"{path}: pairs holds {pair!r}; each must be two names of groups or of points")
        names = (str(pair[0]), str(pair[1]))
        for known in (groups, points):
            if all(name in known for name in names):
                break
        else:
            unknown = next((name for name in names if name not in groups | points), None)
            problem = f"{unknown!r}, which is neither" if unknown else f"{pair!r}, one of each"
            raise UserError(
                f"{path}: pairs names {problem}; give two groups ({', '.join(sorted(groups))}) or two points "
                f"(such as {sorted(points)[0]})"
            )
        if not _ever_matches(names, runs):
            raise UserError(
                f"{path}: pairs holds {pair!r}, which have no point and seed in common, so nothing would be compared; "
                f"name two points (such as {sorted(points)[0]}), or give both the same axes and a seed"
            )
        found.append(names)
    return found


def _ever_matches(names: tuple[str, str], runs: list[StudyRun]) -> bool:
    """Whether any run of the first name has a partner of the second, as `tabulate` matches them."""
    of_point = {(run.point, run.seed): run for run in runs}
    if {run.point for run in runs}.issuperset(names):
        return any((names[1], run.seed) in of_point for run in runs if run.point == names[0])
    return any(
        ("-".join([names[1], *run.labels.values()]), run.seed) in of_point
        for run in runs
        if run.group == names[0]
    )


def _curve(value: Any, runs: list[StudyRun], place: str) -> Curve:
    curve = _mapping(value, place, CURVE_KEYS)
    pair, against, points = curve.get("pair"), curve.get("against"), curve.get("points")
    groups = {run.group for run in runs}
    if not isinstance(pair, list) or len(pair) != 2 or not set(map(str, pair)) <= groups:
        raise UserError(f"{place}: pair is {pair!r}; it must be two groups ({', '.join(sorted(groups))})")
    if not isinstance(against, str) or against not in AXES:
        raise UserError(f"{place}: against is {against!r}; it must be one of {', '.join(AXES)}")
    labels = {label for run in runs if run.group == str(pair[0]) for label in run.labels.values()}
    if not isinstance(points, list) or not points or not set(map(str, points)) <= labels:
        known_points = ", ".join(sorted(labels)) or "none"
        raise UserError(
            f"{place}: points is {points!r}; it must be a list of points of {pair[0]}: {known_points}"
        )
    return Curve((str(pair[0]), str(pair[1])), against, tuple(map(str, points)))
