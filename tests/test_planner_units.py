"""Units and hardware names: what is understood, and what is refused with which words."""

import pytest

from dsmoe.errors import UserError
from dsmoe.planner.hardware import ACCELERATORS, parse_gpu
from dsmoe.planner.units import (
    format_bytes,
    format_count,
    parse_count,
    parse_flops,
    parse_integer,
    parse_memory,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GB", 24e9),
        ("24GiB", 24 * 2**30),
        ("640 GB", 640e9),
        ("1.5TB", 1.5e12),
        ("24g", 24e9),
        ("512 mib", 512 * 2**20),
        ("24000000000", 24e9),
        ("2.4e10", 2.4e10),
    ],
)
def test_memory(text, expected):
    assert parse_memory(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e22", 1e22),
        ("10 ZFLOP", 1e22),
        ("3EFLOPs", 3e18),
        ("3 eflops", 3e18),
        ("1E22", 1e22),
        ("2.5e+21 FLOPs", 2.5e21),
        ("10 PF-days", 8.64e20),
        ("10 PFLOP/s-days", 8.64e20),
    ],
)
def test_flops(text, expected):
    assert parse_flops(text) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.1e9", 1.1e9),
        ("1.1B", 1.1e9),
        ("500M", 5e8),
        ("2T", 2e12),
        ("500B tokens", 5e11),
        ("1,000,000", 1e6),
    ],
)
def test_counts(text, expected):
    assert parse_count(text, "--max-tokens") == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("parse", "flag", "text", "words"),
    [
        (parse_memory, "--memory", "24", "24GB"),
        (parse_memory, "--memory", "24 apples", "unknown unit 'apples'"),
        (parse_memory, "--memory", "much", "not a quantity"),
        (parse_memory, "--memory", "-24GB", "above zero"),
        (parse_memory, "--memory", "0GB", "above zero"),
        (parse_flops, "--flops", "1e22 FLOP/s", "rate"),
        (parse_flops, "--flops", "1e22 tokens", "unknown unit"),
        (parse_flops, "--flops", "nan", "not a quantity"),
        (parse_flops, "--flops", "1e999", "finite"),
        (parse_count, "--max-tokens", "5 GB", "unknown unit"),
        (parse_integer, "--context", "1.5", "whole number"),
        (parse_integer, "--context", "16k", "whole number"),
        (parse_integer, "--batch", "0", "at least 1"),
    ],
)
def test_wrong_units_name_flag_and_value(parse, flag, text, words):
    with pytest.raises(UserError) as caught:
        parse(text, flag)
    message = str(caught.value)
    assert flag in message
    assert text.strip() in message
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        ("h100:8", 640e9),
        ("8xH100", 640e9),
        ("RTX 4090", 24e9),
        ("a100-40:2", 80e9),
        ("A100", 80e9),
        ("h200", 141e9),
    ],
)
def test_hardware(text, memory):
    assert parse_gpu(text).memory_bytes == memory


def test_training_flops_of_hardware():
    # 8 x 989.4e12 FLOP/s, 40%, 30 days
    assert parse_gpu("h100:8").training_flops(30, 0.4) == pytest.approx(8 * 989.4e12 * 0.4 * 30 * 86400)


@pytest.mark.parametrize(
    ("text", "words"),
    [("h1000:8", "'h100'"), ("h100:0", "at least 1"), (":8", "h100:8"), ("2xh100:8", "h100:8")],
)
def test_unknown_hardware_names_the_nearest(text, words):
    with pytest.raises(UserError, match=words):
        parse_gpu(text)


def test_every_accelerator_has_a_source():
    assert all(entry.source and entry.peak_flops > 1e13 for entry in ACCELERATORS.values())


def test_formats():
    assert [format_count(value) for value in (18.88e9, 999.9e6, 1.5e12, 3e15)] == [
        "18.9B",
        "1B",
        "1.5T",
        "3,000T",
    ]
    assert [format_bytes(value) for value in (24e9, 1.5e12, 999.9e6)] == ["24 GB", "1.5 TB", "1 GB"]
