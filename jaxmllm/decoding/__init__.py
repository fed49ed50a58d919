"""Answering: generation on a key-value cache, greedy or drawn."""

from jaxmllm.decoding.fit import batch_that_fits
from jaxmllm.decoding.generate import Generated, generate
from jaxmllm.decoding.sampling import Sampling

__all__ = ["Generated", "Sampling", "batch_that_fits", "generate"]
