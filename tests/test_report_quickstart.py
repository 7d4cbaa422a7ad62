"""Plots and records: files appear, are images, and a record holds what backs it. The script: what is made anew."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from dsmoe.errors import UserError
from dsmoe.records import write_record
from dsmoe.report import quickstart
from dsmoe.report.plots import expert_use, loss_curves, quality_against_active

ROOT = Path(__file__).resolve().parents[1]
# in place of every command that the script calls: says so, and makes what the script looks for
STUB = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> calls.txt
while [ $# -gt 1 ]; do
  case "$1" in --output | --train.output_dir) out="$2" ;; esac
  shift
done
case "${out:-}" in
  *.json | "") ;;
  *.gz) touch "$out" ;;
  *) mkdir -p "$out" && touch "$out"/{summary,meta,benchmarks,sparsity}.json ;;
esac
"""


def lines(offset):
    found = [{"step": i, "tokens": 1000 * i, "lm_loss": 8 - i / 20 + offset} for i in range(1, 41)]
    return [
        *found,
        {"step": 40, "tokens": 40_000, "validation_loss": 6.1 + offset, "validation_loss_sparse": 6.2},
    ]


def model(name, loss, active):
    return {"name": name, "validation_loss": loss, "num_params_active": active}


def point(active, loss):
    return {"num_params_active": active, "loss": loss}


def test_plots_are_images(tmp_path):
    loss_curves({"dense": lines(0.0), "dsmoe": lines(0.1)}, tmp_path / "a.png")
    models = [
        model("dense", 6.1, 2_900_000),
        model("dsmoe-sparse", 6.2, 1_800_000),
        model("foreign", None, 1),
    ]
    quality_against_active(models, {"top K": [point(1e6, 7.0), point(2e6, 6.3)]}, tmp_path / "b.png")
    row = {"mean": 2.5, "p50": 2, "p95": 4, "expert_share": [0.9, 0.1, 0.6, 0.9]}
    expert_use({"num_experts": 4, "per_layer": [{"mlp": row}, {"mlp": row}]}, tmp_path / "c.png")
    for name in "abc":
        pixels = plt.imread(tmp_path / f"{name}.png")
        assert min(pixels.shape[:2]) > 300
        assert pixels.std() > 0.01
    assert len(list(tmp_path.iterdir())) == 3


def test_a_record_holds_command_versions_and_checksums(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    write_record(
        tmp_path / "record",
        title="A title",
        command="python x.py",
        conclusion="A tie.",
        files=[tmp_path / "results.json"],
        details={"seeds": [0, 1]},
    )
    record = json.loads((tmp_path / "record" / "record.json").read_text())
    assert record["command"] == "python x.py"
    assert record["seeds"] == [0, 1]
    assert record["versions"]["torch"]
    assert set(record["files"]) == {"results.json"}
    assert "A tie." in (tmp_path / "record" / "README.md").read_text()
    with pytest.raises(UserError, match=r"missing\.json"):
        write_record(
            tmp_path / "other", title="t", command="c", conclusion="", files=[tmp_path / "missing.json"]
        )
    assert not (tmp_path / "other").exists()


def test_no_folder_but_a_record_is_replaced(tmp_path, capsys):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a").touch()
    # before anything is read: there are no runs here
    for folder in ("precious", "."):
        assert quickstart.main([str(tmp_path / "runs"), "--record", str(tmp_path / folder)]) == 2
        assert "is no record" in capsys.readouterr().err
    assert (tmp_path / "precious" / "a").exists()


@pytest.fixture
def script(tmp_path):
    """script(QUICKSTART_LIMIT="5") runs a copy of the quickstart with stubs: (status, stderr, what it trained or cut)."""
    for name in ("train", "stubs"):
        (tmp_path / name).mkdir()
    shutil.copytree(ROOT / "configs" / "quickstart", tmp_path / "configs" / "quickstart")
    shutil.copy(ROOT / "train" / "quickstart.sh", tmp_path / "train")
    (tmp_path / "train" / "environment.sh").write_text('PATH="$PWD/stubs:$PATH"\n')
    for name in ("dsmoe", "accelerate", "python"):
        (tmp_path / "stubs" / name).write_text(STUB)
        (tmp_path / "stubs" / name).chmod(0o755)
    calls = tmp_path / "calls.txt"

    def run(**settings):
        calls.write_text("")
        clean = {name: value for name, value in os.environ.items() if not name.startswith("QUICKSTART_")}
        done = subprocess.run(
            ["bash", str(tmp_path / "train" / "quickstart.sh")],
            env={**clean, **settings},
            capture_output=True,
            text=True,
        )
        made = [
            line.split(f"{option} ")[1].split()[0].rpartition("/")[2]
            for line in calls.read_text().splitlines()
            for command, option in (("accelerate", "--train.output_dir"), ("dsmoe sparsify", "--output"))
            if line.startswith(command)
        ]
        return done.returncode, done.stderr, made

    return run


def test_finished_parts_are_kept_and_what_is_made_of_them_follows(script, tmp_path):
    folder = tmp_path / "runs" / "quickstart"
    assert script() == (0, "", ["dense", "dense-active", "dsmoe", "dsmoe-sparse"])
    assert script() == (0, "", [])
    assert "eval/report_quickstart.py runs/quickstart" in (tmp_path / "calls.txt").read_text()
    # else two different models would be compared: the old sparse one and the new one with all experts
    shutil.rmtree(folder / "dsmoe")
    assert script() == (0, "", ["dsmoe", "dsmoe-sparse"])
    shutil.rmtree(folder / "dsmoe-sparse")
    assert script() == (0, "", ["dsmoe-sparse"])
    shutil.rmtree(folder / "dense")
    assert script() == (0, "", ["dense"])


def test_a_folder_is_of_one_setting(script, tmp_path):
    folder, config = tmp_path / "runs" / "quickstart", tmp_path / "configs" / "quickstart" / "dsmoe.yaml"
    assert script(QUICKSTART_TOKENS="1000")[0] == 0
    before = sorted(tmp_path.rglob("*"))

    def refused(words, **settings):
        status, error, made = script(**settings)
        assert status == 2 and made == [] and (tmp_path / "calls.txt").read_text() == ""
        assert error.startswith("error: runs/quickstart holds parts of other settings (") and words in error
        assert "set QUICKSTART_DIR to another folder, or remove this one" in error and error.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before

    refused("(QUICKSTART_TOKENS: 2000, was 1000)", QUICKSTART_TOKENS="2000")
    refused("(QUICKSTART_TOKENS: as in the configs, was 1000)")
    refused("(QUICKSTART_LIMIT: 5, was 200)", QUICKSTART_TOKENS="1000", QUICKSTART_LIMIT="5")
    kept = config.read_text()
    config.write_text(f"{kept}# edited\n")
    refused("(configs/quickstart/dsmoe.yaml: checksum ", QUICKSTART_TOKENS="1000")
    config.write_text(kept)
    assert script(QUICKSTART_TOKENS="1000") == (0, "", [])
    other = {"QUICKSTART_DIR": "other", "QUICKSTART_TOKENS": "2000"}
    assert script(**other)[2] == ["dense", "dense-active", "dsmoe", "dsmoe-sparse"]
    assert "--train.total_tokens 2000" in (tmp_path / "calls.txt").read_text()
    # of an older quickstart
    (folder / "settings.txt").unlink()
    before = sorted(tmp_path.rglob("*"))
    refused("QUICKSTART_TOKENS: 1000, was not known", QUICKSTART_TOKENS="1000")
