"""The benchmarks: small readers of official files, each with the metric, the forms and the units of its score."""

from __future__ import annotations

from jaxmllm.data.benchmarks.base import Benchmark, Example, Row, Skipped, Source, Submission, Unit
from jaxmllm.data.benchmarks.docvqa import DOCVQA
from jaxmllm.data.benchmarks.gqa import GQA
from jaxmllm.data.benchmarks.llava import LLAVA, SCENES_BENCHMARK
from jaxmllm.data.benchmarks.mmbench import MMBENCH
from jaxmllm.data.benchmarks.okvqa import OKVQA
from jaxmllm.data.benchmarks.pope import POPE
from jaxmllm.data.benchmarks.textvqa import TEXTVQA, TEXTVQA_OCR
from jaxmllm.data.benchmarks.vizwiz import VIZWIZ
from jaxmllm.data.benchmarks.vqav2 import VQAV2
from jaxmllm.errors import InputError

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        GQA, VQAV2, OKVQA, VIZWIZ, TEXTVQA, TEXTVQA_OCR, DOCVQA, MMBENCH, POPE, LLAVA, SCENES_BENCHMARK,
    )
}  # fmt: skip


def benchmark_named(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
      InputError: there is none.
    """
    if name not in BENCHMARKS:
        raise InputError(f"no benchmark is called {name!r}; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "Example",
    "Row",
    "Skipped",
    "Source",
    "Submission",
    "Unit",
    "benchmark_named",
]
