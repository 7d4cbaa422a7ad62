"""Whether the trainer would take the runs of a study, found out before the first of them trains."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

from dsmoe.errors import UserError
from dsmoe.files import load_yaml
from dsmoe.study.launcher import arguments
from dsmoe.study.spec import Study, StudyRun
from dsmoe.trainer.command import parse


def check_runs(study: Study, runs: Sequence[StudyRun], output: Path) -> None:
    """Read each run's command line as the trainer will; runs that differ in their seed alone are read once.

    A run that starts from another one's weights (`train.init_from`) is left to the trainer, since those may be yet to
    come; what a setting means on a machine (data, processes) is too.

    Raises:
        UserError: a setting that doesn't exist, or values that can't work; the message names the run.
    """
    recipe = (load_yaml(study.config) if study.config else None) or {}
    seen = set()
    for run in runs:
        train = recipe.get("train") if isinstance(recipe, dict) else None
        starts_elsewhere = isinstance(train, dict) and train.get("init_from")
        if run.point in seen or run.settings.get("train.init_from", starts_elsewhere):
            continue
        seen.add(run.point)
        heard = io.StringIO()
        try:
            with contextlib.redirect_stderr(heard):
                parse(arguments(study, run, output, threads=0))
        except UserError as error:
            raise UserError(f"{run.name}: {error}") from None
        except SystemExit:
            words = heard.getvalue().strip().removeprefix("error: ")
            raise UserError(f"{run.name}: {words}") from None
