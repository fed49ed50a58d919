"""The command line: thin commands over the library."""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from jaxmllm.errors import InputError, JaxmllmError
from jaxmllm.parallel import libtpu

app = typer.Typer(
    help="Where does vision meet language? Multimodal LLMs in JAX, for interpretability.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DEMO = Path(__file__).parent / "demo"

Logdir = Annotated[
    str,
    typer.Option(
        help="Folder for TensorBoard's files and the tables, a path or a URL such as gs://bucket/run; a run that "
        "stopped goes on."
    ),
]
Mesh = Annotated[
    str | None,
    typer.Option(help="Devices for examples and for the parts of the model: data=4,model=2; by default chosen."),
]
Curves = Annotated[
    list[str],
    typer.Option(
        "--edits",
        help="What to do at each layer: erase, blind or knockout; add :from, :up_to or an odd window (knockout:9).",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Questions each device computes together, at most.")]
Plain = Annotated[bool, typer.Option("--plain", help="Run everything for every layer: slow; the fast way's oracle.")]
Budget = Annotated[
    float | None,
    typer.Option(min=0.0, help="GB of device memory to take, weights included; by default all."),
]
Cache = Annotated[
    Path | None, typer.Option(help="Folder that keeps the erased image's keys for later sweeps of the same model.")
]
CacheLimit = Annotated[float, typer.Option(min=0.0, help="GB the cache may take; what was not used for longest goes.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Take only the first so many questions.")]
Dtype = Annotated[str, typer.Option(help="What the model computes in: float32, bfloat16 or float16.")]
Examples = Annotated[int, typer.Option(min=0, help="Questions whose attention is drawn.")]
BENCHMARKS = "gqa, vqav2, okvqa, vizwiz, textvqa, textvqa-ocr, docvqa, mmbench, pope, llava or scenes."
Benchmark = Annotated[
    str | None,
    typer.Option(help=BENCHMARKS),
]
Data = Annotated[
    Path | None, typer.Option(help="Folder of the benchmark's official files; scenes come with the package.")
]
Split = Annotated[str | None, typer.Option(help="One of the benchmark's splits; by default its usual one.")]
Prompt = Annotated[
    str | None, typer.Option(help="Template with {question} in it, or a TOML file in the form of prompts.toml.")
]
Conversation = Annotated[
    str | None, typer.Option(help="A conversation of prompts.toml instead of the chat template: vicuna_v1.")
]
NewTokens = Annotated[
    int | None, typer.Option(min=1, help="Tokens an answer may have; by default the benchmark's own number.")
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out, and list, what cannot be read, rather than to stop at it.")
]


@app.command()
def demo(
    logdir: Annotated[Path | None, typer.Option(help="New folder for results; by default one under runs/.")] = None,
    limit: Limit = None,
    methods: Annotated[
        bool, typer.Option("--methods", help="Let all methods answer questions about small objects instead.")
    ] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the scenes of --methods; by default 0.")] = None,
) -> None:
    """Finds the fusion layers of the embedded model on its held-out scenes. Needs no network and no GPU.

    With --methods, contrastive attention, its rivals and controls answer the same questions about scenes of small
    objects, of which a right crop shows more than the whole.
    """
    from jaxmllm.commands.study import Options, study_file

    logdir = logdir or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    if methods:
        from jaxmllm.commands.contest import contest_and_report

        contest_and_report(DEMO, logdir, limit, seed or 0)
        return
    if seed is not None:
        raise InputError("--seed draws the scenes of --methods; the held-out scenes of the demo are always the same")
    questions = DEMO / "questions"
    study_file(DEMO / "model", questions / "questions.jsonl", questions / "images", logdir, Options(), limit)


@app.command()
def sweep(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, Orbax store, or org/name on the hub.")],
    logdir: Logdir,
    questions: Annotated[
        Path | None, typer.Option(help="Question file in LLaVA's JSONL form, with an answer field.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images it names.")] = None,
    benchmark: Benchmark = None,
    data: Data = None,
    split: Split = None,
    prompt: Prompt = None,
    conversation: Conversation = None,
    max_new_tokens: NewTokens = None,
    skip_bad: SkipBad = False,
    edits: Curves = ["erase", "blind", "blind:from", "knockout"],  # noqa: B006  typer copies it
    batch_size: BatchSize = 16,
    limit: Limit = None,
    dtype: Dtype = "float32",
    examples: Examples = 8,
    plain: Plain = False,
    budget: Budget = None,
    cache: Cache = None,
    cache_limit: CacheLimit = 4.0,
    mesh: Mesh = None,
) -> None:
    """Hides the image at every layer of a model and reports how the answers suffer.

    Asks the questions of a file (--questions, --images), or those of a benchmark (--benchmark, --data); then answers
    are generated at every layer too, and scored as the benchmark's evaluator does.
    """
    from jaxmllm.commands.study import Options, study_benchmark, study_file
    from jaxmllm.evaluation.request import Request

    options = Options(edits, batch_size, dtype, examples, plain, budget, cache, cache_limit, mesh)
    if benchmark is not None and questions is None and images is None:
        request = Request(
            model=model,
            benchmark=benchmark,
            data=data,
            split=split,
            limit=limit,
            skip_bad=skip_bad,
            prompt=prompt,
            conversation=conversation,
            max_new_tokens=max_new_tokens,
            dtype=dtype,
        )
        study_benchmark(request, logdir, options)
    elif benchmark is None and questions is not None and images is not None:
        study_file(model, questions, images, logdir, options, limit)
    else:
        raise InputError("a sweep asks either a question file (--questions and --images) or a benchmark (--benchmark)")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint folder, or org/name on the hub.")],
    destination: Annotated[Path, typer.Argument(help="New folder for the Orbax store.")],
    param_dtype: Annotated[
        str | None, typer.Option(help="Type of the stored weights; by default the checkpoint's own.")
    ] = None,
) -> None:
    """Converts a Hugging Face checkpoint into an Orbax store, piece by piece, each read back and compared.

    A conversion that was stopped, even by a kill, goes on when the same command is given again.
    """
    from jaxmllm.commands.conversion import convert_and_report

    convert_and_report(source, destination, param_dtype)


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="Orbax store, checkpoint folder, or org/name on the hub.")],
    destination: Annotated[Path, typer.Argument(help="New folder, which transformers can load.")],
    dtype: Annotated[
        str | None, typer.Option(help="Type of the written weights; by default that of the source.")
    ] = None,
) -> None:
    """Writes weights as a Hugging Face folder: config.json, processor files, safetensors."""
    from jaxmllm.commands.conversion import export_and_report

    export_and_report(source, destination, dtype)


@app.command()
def verify(store: Annotated[Path, typer.Argument(help="Orbax store written by `jaxmllm convert`.")]) -> None:
    """Reads a whole store and compares it with the checksums taken when it was written."""
    from jaxmllm.commands.conversion import verify_and_report

    verify_and_report(store)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, Orbax store, or org/name on the hub.")],
    benchmark: Annotated[str, typer.Option(help=BENCHMARKS)],
    data: Data = None,
    logdir: Annotated[
        str | None,
        typer.Option(
            help="Folder of the run, a path or a URL such as gs://bucket/run, by default one under runs/; a run that "
            "stopped goes on."
        ),
    ] = None,
    split: Split = None,
    limit: Limit = None,
    edits: Annotated[
        str | None,
        typer.Option(help="Interventions during generation: erase:12, blind:3-7, knockout:8-, erase:12+knockout:0-3."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="How to answer: vicrop, vcd:alpha=1, contrastive:candidates=all; see `jaxmllm methods`."),
    ] = None,
    fusion_layers: Annotated[
        str | None, typer.Option(help="For contrastive attention: 2+4+8, or the fusion.json that a sweep wrote.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Questions computed together; by default as many as fit.")
    ] = None,
    max_new_tokens: NewTokens = None,
    temperature: Annotated[float | None, typer.Option(help="Draw tokens at this temperature; else greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the most probable tokens up to this sum.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    prompt: Prompt = None,
    conversation: Conversation = None,
    dtype: Dtype = "float32",
    budget: Budget = None,
    skip_bad: SkipBad = False,
    examples: Annotated[int, typer.Option(min=0, help="Questions that are drawn with their pictures.")] = 24,
    mesh: Mesh = None,
) -> None:
    """Answers a benchmark's questions and scores the answers as its official evaluator does."""
    from jaxmllm.commands.evaluation import evaluate_and_report
    from jaxmllm.decoding import Sampling
    from jaxmllm.evaluation.request import Request

    sampled = (temperature, top_k, top_p) != (None, None, None)
    request = Request(
        model=model,
        benchmark=benchmark,
        data=data,
        split=split,
        limit=limit,
        skip_bad=skip_bad,
        prompt=prompt,
        conversation=conversation,
        edits=edits,
        method=method,
        fusion_layers=fusion_layers,
        sampling=Sampling(1.0 if temperature is None else temperature, top_k, top_p) if sampled else None,
        seed=seed,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
    )
    evaluate_and_report(request, logdir, batch_size, budget, examples, mesh)


@app.command()
def methods() -> None:
    """Lists the methods that `evaluate --method` takes, with their options and presets."""
    from jaxmllm.commands.methods import print_methods

    print_methods()


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, Orbax store, config.json, or org/name on the hub.")],
    topology: Annotated[str, typer.Option(help="TPU chips and how they are wired: v5e:4x4, v6e:4x4, v4:2x2x2.")],
    job: Annotated[str, typer.Option(help="sweep, evaluate or forward (one clean pass with a study's captures).")],
    mesh: Annotated[
        str | None, typer.Option(help="Plan one mesh alone: data=4,model=4; by default all that make sense.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="How many; by default those of GQA's testdev.")] = 12_578,
    image: Annotated[str, typer.Option(help="Width and height of a typical image in pixels.")] = "640x480",
    image_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a typical image, instead of its size (Qwen-VL).")
    ] = None,
    prefix_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt before the image.")] = 8,
    question_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt behind the image.")] = 32,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a reference answer (sweep, forward).")] = 4,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that evaluate generates.")] = 16,
    edits: Curves = ["erase"],  # noqa: B006  typer copies it
    questions_an_image: Annotated[float, typer.Option(min=1.0, help="Of a sweep, which shares images.")] = 1.0,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Questions a row of the mesh takes together; by default as many as fit.")
    ] = None,
    dtype: Dtype = "bfloat16",
    output: Annotated[Path | None, typer.Option("--json", help="JSON file for everything.")] = None,
) -> None:
    """Says whether a job fits TPUs that are not there, and what it should cost, by the real compiler.

    Needs no TPU and no weights, but the TPU compiler: the extra "tpu-plan".
    """
    from jaxmllm.commands.planning import plan_and_report, read_size
    from jaxmllm.planning.work import Work

    work = Work(
        job=job,
        questions=questions,
        image=read_size(image),
        image_tokens=image_tokens,
        prefix_tokens=prefix_tokens,
        question_tokens=question_tokens,
        answer_tokens=answer_tokens,
        new_tokens=new_tokens,
        edits=tuple(edits),
        a_context=questions_an_image,
        dtype=dtype,
        rows=batch_size,
    )
    plan_and_report(model, topology, work, mesh, output)


@app.command()
def validate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, Orbax store, or org/name on the hub.")],
    save: Annotated[
        Path | None,
        typer.Option(help="Run PyTorch's side alone and keep it in this new folder, to compare with elsewhere."),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Compare with a folder that --save wrote; needs no torch.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Hugging Face folder that PyTorch loads, where MODEL is an Orbax store.")
    ] = None,
    logdir: Annotated[
        Path | None,
        typer.Option(help="Folder for report.html, .md, .json and TensorBoard's files; by default one under runs/."),
    ] = None,
    phases: Annotated[
        str | None, typer.Option(help="Some of the phases, with commas between them: tensors,vision,decoder.")
    ] = None,
    dtype: Dtype = "float32",
    precision: Annotated[str, typer.Option(help="JAX's matmul precision: default, high or highest.")] = "highest",
    streamed: Annotated[
        bool | None,
        typer.Option("--streamed/--whole", help="Hold one decoder layer at a time; by default where memory is short."),
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture to ask about besides the drawn ones; may be repeated.")
    ] = None,
    question: Annotated[list[str] | None, typer.Option(help="What is asked of it; one a picture.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that are generated greedily.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the drawn pictures.")] = 0,
) -> None:
    """Proves, or refutes, that the port computes what PyTorch computes on a checkpoint, component by component.

    Exit code 0: nothing departs by more than PyTorch's own noise; 1: something differs, and the report says what comes
    first and why; 2: it could not be run. Needs PyTorch (the extra "validate"), or a recording (--reference).
    """
    from jaxmllm.commands.validation import Request, validate_and_report
    from jaxmllm.validation.phases import PHASES, Settings

    settings = Settings(
        dtype=dtype,
        precision=precision,
        streamed=streamed,
        phases=PHASES if phases is None else tuple(name.strip() for name in phases.split(",")),
        images=tuple(image or ()),
        questions=tuple(question or ()),
        seed=seed,
        new_tokens=new_tokens,
        accelerators=save is not None,
    )
    raise typer.Exit(validate_and_report(Request(model, save, reference, against, logdir), settings))


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a run of evaluate.")],
    second: Annotated[Path, typer.Argument(help="Folder of another run over the same benchmark.")],
    output: Annotated[
        Path | None, typer.Option(help="JSON file for everything, all questions won and lost too.")
    ] = None,
    questions: Annotated[int, typer.Option(min=0, help="Questions won, and lost, that are printed.")] = 5,
) -> None:
    """Says what the second run gains over the first: paired bootstrap, questions won and lost."""
    from jaxmllm.commands.evaluation import compare_and_report

    compare_and_report(first, second, output, questions)


def main() -> None:
    """Entry point: errors that a user can mend become one line and exit code 2."""
    if not libtpu.has_tpu():  # it may be there to plan with, and has nothing to say then
        libtpu.compile_only()
    try:
        app()
    except JaxmllmError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, highlight=False)
        _leave(2)
    except Exception:
        traceback.print_exc()
        _leave(1)


def _leave(code: int) -> NoReturn:
    """Ends the process; one of several has not to wait for the others, who would wait for it."""
    if "jax" in sys.modules:
        from jaxmllm.parallel import processes

        processes.leave(code)
    sys.exit(code)
