"""Metrics of the benchmarks, as their official evaluators compute them, warts included.

Each takes plain texts and returns a score from 0 to 1 for one question; a benchmark's accuracy is the mean over its
questions. Which file of which evaluator a metric follows, and its oddities, are in its docstring.
"""

from __future__ import annotations

from jaxmllm.data.metrics.docvqa import anls
from jaxmllm.data.metrics.evalai import okvqa_accuracy, textvqa_accuracy, vizwiz_accuracy
from jaxmllm.data.metrics.gqa import gqa_match
from jaxmllm.data.metrics.mmbench import CircularAccuracy, mmbench_accuracies, mmbench_circular, mmbench_option
from jaxmllm.data.metrics.normalisation import evalai_normalise, vqa_normalise
from jaxmllm.data.metrics.pope import PopeScores, pope_label, pope_scores
from jaxmllm.data.metrics.vqa import vqa_accuracy

__all__ = [
    "CircularAccuracy",
    "PopeScores",
    "anls",
    "evalai_normalise",
    "gqa_match",
    "mmbench_accuracies",
    "mmbench_circular",
    "mmbench_option",
    "okvqa_accuracy",
    "pope_label",
    "pope_scores",
    "textvqa_accuracy",
    "vizwiz_accuracy",
    "vqa_accuracy",
    "vqa_normalise",
]
