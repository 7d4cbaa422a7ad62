"""Results of several benchmark runs as one."""

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
