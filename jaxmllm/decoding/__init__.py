"""Answering: generation on a key-value cache, and the probability of given answers."""

from jaxmllm.decoding.fit import batch_that_fits
from jaxmllm.decoding.generate import Generated, answer, generate
from jaxmllm.decoding.likelihood import score_answers, score_options
from jaxmllm.decoding.sampling import Sampling

__all__ = ["Generated", "Sampling", "answer", "batch_that_fits", "generate", "score_answers", "score_options"]
