"""What is asked of whom: checked before anything is loaded or written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxmllm.analysis.edit_specs import normal_spec, parse_edits
from jaxmllm.analysis.fusion import read_fusion_layers
from jaxmllm.convert import checkpoint
from jaxmllm.data.benchmarks import benchmark_named
from jaxmllm.data.benchmarks.base import Benchmark, Source
from jaxmllm.data.prompts import prompt_template
from jaxmllm.decoding import Sampling
from jaxmllm.errors import InputError
from jaxmllm.evaluation.settings import Settings, data_fingerprint, model_fingerprint
from jaxmllm.methods import Method, parse_method, spell
from jaxmllm.model import DTYPES, find_checkpoint
from jaxmllm.models.registry import family_of


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of whom, and how.

    Attributes:
      model: checkpoint folder, Orbax store, or org/name on the hub.
      benchmark: a name of ``jaxmllm.data.benchmarks``.
      data: the folder of its files; ``None`` for the scenes that come with the package.
      split: one of the benchmark's; ``None`` for its usual one.
      limit: only the first so many questions.
      skip_bad: leave out, and list, what cannot be read, rather than to stop at it.
      prompt: a template, or a file of templates, instead of the benchmark's own (see ``jaxmllm.data.prompts``).
      conversation: name of a conversation to wrap it in, instead of the checkpoint's chat template.
      edits: interventions in words, as ``jaxmllm.analysis.edit_specs`` has them.
      method: how questions are answered, in words as ``jaxmllm.methods.parse_method`` reads them; ``None`` for plainly.
      fusion_layers: for methods that use them, by hand as ``2+4+8`` or a file that ``jaxmllm sweep`` wrote.
      sampling: how tokens are drawn; ``None`` for greedy answers. ``seed`` decides what is drawn.
      max_new_tokens: tokens an answer may have; ``None`` for the benchmark's own number.
      dtype: what the model computes in.
    """

    model: str | Path
    benchmark: str
    data: Path | None = None
    split: str | None = None
    limit: int | None = None
    skip_bad: bool = False
    prompt: str | Path | None = None
    conversation: str | None = None
    edits: str | None = None
    method: str | None = None
    fusion_layers: str | Path | None = None
    sampling: Sampling | None = None
    seed: int = 0
    max_new_tokens: int | None = None
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Opened:
    """A benchmark ready to be asked, and what will decide the answers."""

    benchmark: Benchmark
    source: Source
    settings: Settings


def _method(request: Request, num_layers: int) -> str | None:
    """The method in its one spelling, its fusion layers filled in; what does not fit the model is found here.

    Raises:
      InputError: no such method or option, or layers that the model does not have.
    """
    if request.method is None:
        if request.fusion_layers is not None:
            raise InputError("fusion layers are given without a method that would use them (--method contrastive)")
        return None
    layers = None if request.fusion_layers is None else read_fusion_layers(request.fusion_layers)
    method = parse_method(request.method, layers)
    method.edits(num_layers)
    method.reader(num_layers)
    method.rule(num_layers, request.sampling)
    return None if method == Method() else spell(method)


def open_benchmark(request: Request) -> Opened:
    """Reads a benchmark's files and settles a run's settings; the model's weights are not read yet.

    Raises:
      JaxmllmError: anything in the request that cannot be, or a bad record in the data.
    """
    benchmark = benchmark_named(request.benchmark)
    if request.dtype not in DTYPES:
        raise InputError(f"dtype is {request.dtype!r}; expected one of {', '.join(DTYPES)}")
    edits = None if request.edits is None else normal_spec(request.edits)
    max_new_tokens = benchmark.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
    if request.sampling is not None:
        request.sampling.check()
    folder = find_checkpoint(request.model)
    fields = checkpoint.read_json(folder / "config.json")
    family = family_of(fields)
    num_layers = family.read_config(fields).text.num_layers
    if edits is not None:
        parse_edits(edits).check(num_layers)
    method = _method(request, num_layers)
    template = prompt_template(benchmark.name, fields["model_type"], request.prompt, request.conversation)
    source = benchmark.open(request.data, split=request.split, limit=request.limit, skip_bad=request.skip_bad)
    sampling = request.sampling
    settings = Settings(
        model=str(request.model),
        family=fields["model_type"],
        weights=model_fingerprint(folder),
        benchmark=benchmark.name,
        split=request.split,
        data=str(request.data or source.parts[0].records.path.parent),
        files=data_fingerprint(source),
        prompt=template,
        edits=edits,
        temperature=None if sampling is None else sampling.temperature,
        top_k=None if sampling is None else sampling.top_k,
        top_p=None if sampling is None else sampling.top_p,
        seed=None if sampling is None else request.seed,
        dtype=request.dtype,
        max_new_tokens=max_new_tokens,
        limit=request.limit,
        method=method,
    )
    return Opened(benchmark, source, settings)
