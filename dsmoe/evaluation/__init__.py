"""Scoring: lm-eval's tasks, validation loss, decode speed, and the paired comparison of models.

`score` is `eval/score.py`'s run over all of them.
"""
