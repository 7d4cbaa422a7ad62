"""Quantities as people write them: "24GB", "640 GiB", "1e22", "10 ZFLOP", "1.1B", "10 PF-days"."""

import math
import re

from dsmoe.errors import UserError

BYTE_UNITS = {"b": 1.0, **{f"{prefix}b": 1000.0**power for power, prefix in enumerate("kmgtp", 1)}}
BYTE_UNITS |= {f"{prefix}ib": 1024.0**power for power, prefix in enumerate("kmgtp", 1)}
BYTE_UNITS |= {unit[:-1]: size for unit, size in BYTE_UNITS.items() if len(unit) > 1}
SI = {"": 1.0, **{prefix: 1000.0**power for power, prefix in enumerate("kmgtpezy", 1)}}
COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
FLOP_DAY = 86400.0

_NUMBER = re.compile(
    r"\s*([+-]?(?:\d+(?:[_,]\d{3})*(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?)\s*(.*?)\s*", re.IGNORECASE
)


def _split(text: str, flag: str, right: str) -> tuple[float, str]:
    """Number and lower-case unit of a quantity; the number is positive and finite."""
    matched = _NUMBER.fullmatch(str(text))
    if matched is None:
        raise UserError(f"{flag} {str(text)!r} is not a quantity; write {right}")
    number = float(re.sub(r"[_,]", "", matched[1]))
    if not (number > 0 and math.isfinite(number)):
        raise UserError(f"{flag} {str(text)!r} must be above zero and finite; write {right}")
    return number, matched[2].lower()


def parse_memory(text: str, flag: str = "--memory") -> float:
    """Bytes of "24GB" (10**9), "24GiB" (2**30), "640 GB", "1.5T"; a bare number is bytes.

    Raises:
        UserError: not a quantity of memory, or a bare number too small to be meant in bytes.
    """
    right = "for example 24GB (10**9 bytes) or 24GiB (2**30 bytes)"
    number, unit = _split(text, flag, right)
    if unit == "" and number < 1e6:
        raise UserError(
            f"{flag} {text!r} has no unit and is too small to be bytes; write {text}GB if you mean that"
        )
    if unit not in BYTE_UNITS and unit != "":
        raise UserError(f"{flag} {text!r}: unknown unit {unit!r}; write {right}")
    return number * BYTE_UNITS.get(unit, 1.0)


def parse_flops(text: str, flag: str = "--flops") -> float:
    """Floating-point operations of "1e22", "10 ZFLOP", "3EFLOPs", "10 PF-days".

    Raises:
        UserError: not a number of operations; a rate (per second) is refused.
    """
    right = "for example 1e22, 10 ZFLOP or 100 PF-days"
    number, unit = _split(text, flag, right)
    days = re.fullmatch(r"([kmgtpezy])f(?:lop)?(?:s|/s)?[- ]?days?", unit)
    if days:
        return number * SI[days[1]] * FLOP_DAY
    if re.search(r"/s|per", unit):
        raise UserError(
            f"{flag} {text!r} is a rate; give a number of operations, {right}, or --gpu with --days"
        )
    plain = re.fullmatch(r"([kmgtpezy]?)\s*(?:f|flops?)?", unit)
    if plain is None:
        raise UserError(f"{flag} {text!r}: unknown unit {unit!r}; write {right}")
    return number * SI[plain[1]]


def parse_count(text: str, flag: str) -> float:
    """A count of tokens or parameters: "1.1e9", "1.1B", "500M", "2T", "500M tokens".

    Raises:
        UserError: not a count.
    """
    right = "for example 5e11, 500B or 1.1e9 (K, M, B and T are thousands to trillions)"
    number, unit = _split(text, flag, right)
    matched = re.fullmatch(r"([kmbgt]?)\s*(?:tokens?|params?|parameters?)?", unit)
    if matched is None:
        raise UserError(f"{flag} {text!r}: unknown unit {unit!r}; write {right}")
    return number * COUNTS[matched[1]]


def parse_integer(text: str, flag: str, low: int = 1) -> int:
    """A whole number, also written 1e3 or 16,384.

    Raises:
        UserError: not whole, or under `low`.
    """
    matched = _NUMBER.fullmatch(str(text))
    number = float(re.sub(r"[_,]", "", matched[1])) if matched and not matched[2] else math.nan
    if number != number or not number.is_integer() or number < low:
        raise UserError(f"{flag} {str(text)!r} must be a whole number of at least {low}, without a unit")
    return int(number)


def parse_share(value: float, flag: str) -> float:
    """A share above 0 and at most 1.

    Raises:
        UserError: it is not.
    """
    if not 0 < value <= 1:
        raise UserError(f"{flag} {value} must be above 0 and at most 1")
    return value


def format_count(value: float) -> str:
    """Three digits with K, M, B or T: 18.9B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}" if value < 999.5 * size else f"{value / size:,.0f}{unit}"
    return f"{value:.3g}"


def format_bytes(value: float) -> str:
    """Decimal units, as hardware is sold: 24.0 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f} B"
