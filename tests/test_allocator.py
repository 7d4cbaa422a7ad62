"""Freed memory is used again instead of being fetched from the system page by page."""

import os
import subprocess
import sys

import pytest

from dsmoe.allocator import keep_freed_memory

SCRIPT = """
import resource, sys
import torch
from dsmoe.allocator import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
torch.ones(16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 10 * (64 << 20) // 4096
glibc = pytest.mark.skipif(
    not sys.platform.startswith("linux") or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"),
    reason="glibc only",
)


def run(mode, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    clean.pop("THP_MEM_ALLOC_ENABLE", None)
    command = [sys.executable, "-c", SCRIPT, mode]
    result = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True)
    done, faults = result.stdout.split()
    return done, int(faults)


@glibc
def test_blocks_are_used_again():
    # the block of the first round may be a few bytes short for the second; and now and then something small comes to lie
    # behind it, and every other block is new
    for _ in range(3):
        done, faults = run("keep")
        assert done == "True"
        if faults < PAGES // 5:
            return
    pytest.fail(f"{faults} page faults for {PAGES} pages")


@glibc
def test_what_the_environment_says_wins():
    done, faults = run("keep", MALLOC_TRIM_THRESHOLD_="131072")
    assert done == "False"
    # pages may be huge where the system makes them so by itself
    assert faults >= PAGES // 512


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
