"""The note on bfloat16 where a CPU only emulates it."""

import pytest

from dsmoe.trainer import bf16_speed


@pytest.mark.parametrize(
    ("precision", "on_cpu", "ratio", "told"),
    [
        ("bf16", True, 13.6, True),
        ("bf16", True, 0.6, False),
        ("f32", True, 13.6, False),
        ("bf16", False, 13.6, False),
    ],
)
def test_only_a_slow_bf16_is_told(monkeypatch, precision, on_cpu, ratio, told):
    monkeypatch.setattr(bf16_speed, "bf16_over_f32", lambda: ratio)
    note = bf16_speed.bf16_note(precision, on_cpu)
    assert (note is not None) == told
    if note:
        assert "14 times" in note and "--train.precision f32" in note


def test_the_ratio_is_a_time_over_a_time():
    assert 0 < bf16_speed.bf16_over_f32(size=32, repetitions=2) < 1e4


def test_a_run_says_so_and_trains(train, monkeypatch, capsys):
    monkeypatch.setattr(bf16_speed, "bf16_over_f32", lambda: 20.0)
    assert train("slow", **{"train.precision": "bf16", "train.total_tokens": 128}).status == 0
    assert "note: on this CPU a bf16 matrix product takes 20 times" in capsys.readouterr().out
