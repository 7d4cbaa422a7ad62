"""Benchmarks: this project and its peers in one run, interleaved, compared by ratios."""
