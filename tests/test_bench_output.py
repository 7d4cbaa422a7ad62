"""Results of several benchmark runs as one."""

import json

import pytest

from dsmoe.bench import command, inference_command, serving_command, sparse_training
from dsmoe.bench.output import joined


def test_rows_are_joined_and_the_rest_is_the_firsts():
    one = {"layers": [{"threads": 1}], "model": {"rows": [1], "k": 8}, "hardware": {"cores": 2}, "rounds": 15}
    two = {"layers": [{"threads": 2}], "model": {"rows": [2], "k": 4}, "hardware": {"cores": 4}, "rounds": 3}
    assert joined([one, two]) == {
        "layers": [{"threads": 1}, {"threads": 2}],
        "model": {"rows": [1, 2], "k": 8},
        "hardware": {"cores": 2},
        "rounds": 15,
    }
    assert joined([one]) == one
    assert joined([{"model": None, "layers": []}, one])["layers"] == [{"threads": 1}]


@pytest.mark.parametrize("bench", [command, inference_command, serving_command, sparse_training])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "no entry"),
        ([1], "written"),
        ({"layers": [1], "rows": [1]}, "written"),
        ({"layers": [{"threads": 1}], "rows": [{"threads": 1}]}, "no entry"),
    ],
)
def test_results_of_something_else_are_one_line(tmp_path, capsys, bench, content, reason):
    file, record = tmp_path / "other.json", tmp_path / "record"
    file.write_text(json.dumps(content))
    assert bench.main(pytest.fail, ["--results", str(file), "--record", str(record)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --results {file}: not what --json of this benchmark has written")
    assert reason in error and error.count("\n") == 1
    assert not record.exists()
