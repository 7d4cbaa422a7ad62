"""Accelerators by name: nominal memory and peak arithmetic.

The rates of A100, H100, H100 PCIe and H200 agree with tables that other projects keep; none was checked against the
document that it names.
"""

import difflib
import re
from dataclasses import dataclass

from dsmoe.errors import UserError

DAY = 86400.0


@dataclass(frozen=True)
class Accelerator:
    """One kind of accelerator.

    Args:
        name: as users write it.
        memory_bytes: nominal memory of one, in decimal gigabytes as it is sold.
        peak_flops: dense bfloat16 FLOP/s of one with 32-bit accumulation, no sparsity.
        source: the document that prints them.
    """

    name: str
    memory_bytes: float
    peak_flops: float
    source: str


def _entry(name: str, gigabytes: float, teraflops: float, source: str) -> tuple[str, Accelerator]:
    return name, Accelerator(name, gigabytes * 1e9, teraflops * 1e12, source)


# Data sheets that print only the rate with 2:4 sparsity: halved here.
ACCELERATORS = dict(
    (
        _entry("rtx3090", 24, 71.2, "NVIDIA Ampere GA102 white paper, appendix A"),
        _entry("rtx4090", 24, 165.2, "NVIDIA Ada GPU white paper, appendix A"),
        _entry("l4", 24, 121, "NVIDIA L4 data sheet, halved"),
        _entry("a10", 24, 125, "NVIDIA A10 data sheet"),
        _entry("l40s", 48, 362, "NVIDIA L40S data sheet"),
        _entry("a100-40", 40, 312, "NVIDIA A100 data sheet"),
        _entry("a100-80", 80, 312, "NVIDIA A100 data sheet"),
        _entry("h100", 80, 989.4, "NVIDIA H100 SXM data sheet, halved"),
        _entry("h100-pcie", 80, 756, "NVIDIA H100 PCIe data sheet, halved"),
        _entry("h200", 141, 989.4, "NVIDIA H200 SXM data sheet, halved"),
        _entry("b200", 192, 2250, "NVIDIA Blackwell architecture brief, halved"),
        _entry("mi300x", 192, 1307.4, "AMD Instinct MI300X data sheet"),
    )
)
ALIASES = {"a100": "a100-80", "4090": "rtx4090", "3090": "rtx3090", "h100-sxm": "h100", "h100-80": "h100"}


@dataclass(frozen=True)
class Hardware:
    """Several accelerators of one kind."""

    accelerator: Accelerator
    count: int

    @property
    def memory_bytes(self) -> float:
        """Nominal memory of all together."""
        return self.count * self.accelerator.memory_bytes

    def training_flops(self, days: float, utilisation: float) -> float:
        """Operations done in that many days at that share of the peak (MFU)."""
        return self.count * self.accelerator.peak_flops * utilisation * days * DAY

    def __str__(self) -> str:
        return f"{self.count} x {self.accelerator.name}"


def parse_gpu(text: str, flag: str = "--gpu") -> Hardware:
    """Read "h100:8", "8xh100" or "rtx4090".

    Raises:
        UserError: an unknown name (the nearest known one is named) or a bad count.
    """
    cleaned = re.sub(r"[\s_]+", "", text.lower()).removeprefix("nvidia")
    matched = re.fullmatch(r"(?:(\d+)[x*])?([a-z0-9-]+?)(?:gb)?(?::(\d+))?", cleaned)
    if matched is None or (matched[1] and matched[3]):
        raise UserError(f"{flag} {text!r}: write a name and a count, for example h100:8")
    name = ALIASES.get(matched[2], matched[2])
    if name not in ACCELERATORS:
        known = [*ACCELERATORS, *ALIASES]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
        hint = f"the nearest known name is {near[0]!r}" if near else f"known are {', '.join(ACCELERATORS)}"
        raise UserError(
            f"{flag} {text!r}: no accelerator {matched[2]!r} is known; {hint}; or give --memory (a "
            "count stands after the name: h100:8)"
        )
    count = int(matched[1] or matched[3] or 1)
    if count < 1:
        raise UserError(f"{flag} {text!r}: the count must be at least 1")
    return Hardware(ACCELERATORS[name], count)
