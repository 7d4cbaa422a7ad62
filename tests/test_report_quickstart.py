"""Plots and records: files appear, are images, and a record holds what backs it."""

import json

import pytest
from matplotlib import pyplot as plt

from dsmoe.errors import UserError
from dsmoe.records import write_record
from dsmoe.report import quickstart
from dsmoe.report.plots import expert_use, loss_curves, quality_against_active


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
