"""Evaluation: a model answers a benchmark's questions; results that survive a kill, their summary, and comparisons."""
