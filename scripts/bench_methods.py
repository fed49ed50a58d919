"""Times every method of answering against plain answering, on one random LLaVA.

    python scripts/bench_methods.py                                 # 24 layers of width 1,024
    python scripts/bench_methods.py --quick                         # 12 layers of width 512; some minutes
    python scripts/bench_methods.py --only contrastive --only review-mask
    python scripts/bench_methods.py --layers 4 --width 128 --patches 6 --rounds 2   # to try the script

Each contestant answers the same questions about the same pictures through ``jaxmllm.answer``, from PIL pictures larger
than the model's input to text, in float32: 576 image tokens, questions of a dozen words, answers of a few tokens that
nothing ends early. CARVE decodes as many tokens for its map as an answer has. ``two images`` is no method: it plainly
answers the prompt that ``second-look`` ends with, so it shows what is saved where the first pass is gone on with.

They take turns, round by round, with base before and after each; a contestant's ratio is to the mean of these two, and
medians over the rounds are reported. The first round compiles; a program is billed to the contestant that needs it
first. Passes are counted by the library: over prompts (or what differs from prompts that were run before), backward
through such, and over single generated tokens.

Memory is taken in a round of its own, which needs Linux: what a contestant adds at its peak to what was resident
before, weights and programs not counted. The tokens of ``second-look`` and of ``two images`` are compared, too.

Run it on an idle machine (``cores_busy_elsewhere``). The last line is JSON.
"""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import gc
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from bench_models import (
    FULL,
    IMAGE_TOKEN,
    PATCH,
    QUICK,
    VOCABULARY,
    Load,
    Shape,
    resident,
    save_checkpoint,
    use_all_cores,
    versions,
)
from demo_export import CHAT_TEMPLATE
from PIL import Image
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

import jaxmllm
from jaxmllm.analysis.sharing.compilations import Compilations, count_compilations
from jaxmllm.methods import parse_method
from jaxmllm.methods.answering import answer
from jaxmllm.methods.first import Count
from jaxmllm.methods.tails import with_two_images
from jaxmllm.methods.vicrop import GENERAL
from jaxmllm.processing import make_prompt
from jaxmllm.report.tables import markdown

BASE = "base"
TWO_IMAGES = "two images"
SECOND_LOOK = "second-look"
TARGETS = {SECOND_LOOK: 2.1, "contrastive": 2.1, "review-mask": 1.1, "review-mask:again=question": 1.1}
# The layers of LLaVA-1.5's 32 at which the image is read, by the paper; here at the same depth.
FUSION_LAYERS, DEPTH = (2, 4, 8, 11, 12, 13), 32
TOLERANCE = 1e-3  # of log-probabilities; the library promises 1e-4 of logits
SIZES = ((640, 480), (800, 600))  # of pictures
PREAMBLE = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions. "
)
QUESTION = "What is written on the small {} sign left of the {}?"
COLOURS = ("red", "green", "blue", "white")
THINGS = ("door", "window", "car")
SPECIAL = ("<unk>", "<s>", "</s>")
IMAGE, PAD = "<image>", "<pad>"
log = Console(stderr=True)


def make_questions(count: int) -> list[str]:
    """Questions of a dozen words."""
    return [QUESTION.format(COLOURS[at % len(COLOURS)], THINGS[at % len(THINGS)]) for at in range(count)]


def draw_pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """A ramp under noise, in turn of two sizes."""
    rng = np.random.default_rng(seed)
    pictures = []
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        ramp = np.linspace(0, 128, width)[None, :, None] + np.linspace(0, 64, height)[:, None, None]
        pictures.append(Image.fromarray((ramp + rng.uniform(0, 63, (height, width, 3))).astype(np.uint8)))
    return pictures


def write_processor(shape: Shape, folder: Path) -> None:
    """A tokenizer of whole words that has all ids of the model, and LLaVA-1.5's image processor and prompt."""
    splitter = pre_tokenizers.Whitespace()
    asked = " ".join([PREAMBLE, "USER: ASSISTANT:", GENERAL, QUESTION, *COLOURS, *THINGS])
    words = dict.fromkeys(word for word, _ in splitter.pre_tokenize_str(asked))
    tokens = [*SPECIAL, *words]
    tokens += [f"w{number}" for number in range(len(tokens), VOCABULARY)]
    tokens[IMAGE_TOKEN : IMAGE_TOKEN + 2] = [IMAGE, PAD]
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    side = shape.image_size
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=PREAMBLE + CHAT_TEMPLATE,
    ).save_pretrained(folder)


def load_model(shape: Shape) -> jaxmllm.Model:
    """A random model with a processor; no token ends its answers."""
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        save_checkpoint(shape, folder)
        write_processor(shape, folder)
        (folder / "generation_config.json").write_text("{}")
        model = jaxmllm.load(folder)
        # both are read on first use, when the folder is gone
        assert model.processor is not None and model.endings.stop_tokens == ()
    return model


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a contestant gives: its answers, and the passes an example that it took."""

    generated: jaxmllm.Generated
    count: Count


Contestant = Callable[[], Outcome]


def specs(num_layers: int, new_tokens: int) -> list[str]:
    """The methods, in words."""
    return [
        SECOND_LOOK,
        "contrastive",
        "review-mask",
        "review-mask:again=question",
        "vicrop:map=rel-att",
        "vicrop:map=grad-att",
        "vicrop:map=pure-grad",
        f"carve:steps={new_tokens}",
        "vcd",
        "dola",
        "opera",
        "random-crop",
        f"knockout:layer={num_layers // 2}",
    ]


def make_contestants(
    model: jaxmllm.Model, pictures: list[Image.Image], questions: list[str], new_tokens: int, only: Sequence[str]
) -> dict[str, Contestant]:
    """All of them by name, base first; ``only`` names the others that take part, by how they begin."""
    fusion = sorted({round(layer * model.num_layers / DEPTH) for layer in FUSION_LAYERS})

    def by_method(spec: str) -> Contestant:
        method = parse_method(spec, fusion)

        def run() -> Outcome:
            options: dict[str, Any] = {"max_new_tokens": new_tokens, "stop_tokens": ()}
            details = answer(model, pictures, questions, method=method, **options).details
            return Outcome(details.generated, details.count)

        return run

    def two_images() -> Outcome:
        token = model.processor.image_token
        prompts = [with_two_images(make_prompt(model.processor, question, 1), token) for question in questions]
        inputs = model.prepare([[picture, picture] for picture in pictures], prompts)
        generated = jaxmllm.generate(model, inputs, max_new_tokens=new_tokens, stop_tokens=())
        return Outcome(generated, Count(prompts=1, tokens=new_tokens - 1))

    contestants: dict[str, Contestant] = {BASE: by_method(BASE)}
    for spec in specs(model.num_layers, new_tokens):
        contestants[spec] = by_method(spec)
        if spec == SECOND_LOOK:
            contestants[TWO_IMAGES] = two_images
    if not only:
        return contestants
    chosen = {name: run for name, run in contestants.items() if name == BASE or name.startswith(tuple(only))}
    missing = [wanted for wanted in only if not any(name.startswith(wanted) for name in contestants)]
    if missing:
        sys.exit(f"no contestant begins with {', '.join(missing)}; there are {', '.join(contestants)}")
    return chosen


@dataclasses.dataclass
class Measured:
    """What was measured of a contestant.

    Attributes:
      count: passes an example.
      compiled: programs that it was the first to need, and the seconds they took.
      seconds: of the whole batch, a round an element; ``times_base`` likewise.
      added: bytes of main memory at the peak beyond what was there before; ``None`` where the system does not say.
    """

    count: Count
    compiled: Compilations
    seconds: list[float] = dataclasses.field(default_factory=list)
    times_base: list[float] = dataclasses.field(default_factory=list)
    added: int | None = None

    def figures(self, batch: int) -> dict[str, Any]:
        """Medians and counts by name."""
        return {
            "seconds_a_question": float(np.median(self.seconds)) / batch,
            "times_base": float(np.median(self.times_base)),
            "times_base_by_round": self.times_base,
            "passes": dataclasses.asdict(self.count),
            "compiled": dataclasses.asdict(self.compiled),
            "added_bytes": self.added,
        }


def warm_up(
    contestants: dict[str, Contestant], compilations: Compilations, new_tokens: int
) -> tuple[dict[str, Measured], dict[str, jaxmllm.Generated]]:
    """The first round: compiles, and looks at what was answered."""
    measured, answers = {}, {}
    for name, run in contestants.items():
        before = dataclasses.replace(compilations)
        began = time.perf_counter()
        outcome = run()
        compiled = Compilations(compilations.programs - before.programs, compilations.seconds - before.seconds)
        log.print(
            f"first round: {name} {time.perf_counter() - began:.1f} s, of which {compiled.seconds:.1f} s for "
            f"{compiled.programs} programs"
        )
        lengths = outcome.generated.lengths
        if not (lengths == new_tokens).all():
            sys.exit(f"{name} answered with {lengths.tolist()} tokens, not {new_tokens}")
        measured[name], answers[name] = Measured(outcome.count, compiled), outcome.generated
    return measured, answers


def run_round(contestants: dict[str, Contestant], measured: dict[str, Measured], number: int) -> float:
    """One round against the clock; returns how far apart base's runs are that follow each other, in the median, as a
    share of their mean."""

    def seconds_of(name: str) -> float:
        began = time.perf_counter()
        contestants[name]()
        return time.perf_counter() - began

    bases, gaps = [seconds_of(BASE)], [0.0]
    for name in contestants:
        if name == BASE:
            continue
        spent = seconds_of(name)
        bases.append(seconds_of(BASE))
        base = float(np.mean(bases[-2:]))
        gaps.append(abs(bases[-1] - bases[-2]) / base)
        measured[name].seconds.append(spent)
        measured[name].times_base.append(spent / base)
        log.print(f"round {number + 1}: {name} {spent:.2f} s; base {bases[-2]:.2f} s before, {bases[-1]:.2f} s after")
    measured[BASE].seconds.append(float(np.median(bases)))
    measured[BASE].times_base.append(1.0)
    return float(np.median(gaps[1:] or gaps))


def weigh(run: Contestant) -> int | None:
    """Bytes of main memory that a contestant, warmed up, adds at its peak; see ``bench_models.added_peak``."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def difference(one: jaxmllm.Generated, other: jaxmllm.Generated) -> float:
    """The largest difference of log-probabilities up to, in each answer, the first token that is not the same: there
    both are as likely, but for rounding, and what follows says nothing."""
    parted = one.tokens != other.tokens
    counts = np.cumsum(parted, axis=1) - parted == 0
    return float(np.abs(one.log_probabilities - other.log_probabilities)[counts].max())


def print_report(result: dict[str, Any]) -> None:
    """A table with a contestant a row, and what it says."""
    figures: dict[str, dict[str, Any]] = result["contestants"]
    rows = [["", "s a question", "times base", "prompts", "backward", "tokens", "adds, MB", "compiling, s"]]
    for name, of_one in figures.items():
        rows.append(
            [
                f"`{name}`" if name != TWO_IMAGES else name,
                f"{of_one['seconds_a_question']:.3f}",
                f"{of_one['times_base']:.2f}",
                *(f"{of_one['passes'][kind]:g}" for kind in ("prompts", "backward", "tokens")),
                "" if of_one["added_bytes"] is None else f"{of_one['added_bytes'] / 1e6:.0f}",
                f"{of_one['compiled']['seconds']:.1f}",
            ]
        )
    print(markdown(rows))
    host, compiling = result["preparing_s_a_question"], result["compiling"]
    print(
        f"\nPreparing pictures and prompts takes {host:.4f} s a question, "
        f"{host / figures[BASE]['seconds_a_question']:.1%} of base."
    )
    print(f"Two runs of base that follow each other are {result['spread_of_base']:.1%} apart (median).")
    print(
        f"Compiling took {compiling['seconds']:.0f} s for {compiling['programs']} programs; "
        f"{result['compiled_while_timed']} more were compiled while the clock ran."
    )
    print(f"The process held {result['peak_memory_bytes'] / 1e9:.2f} GB at its peak, compiling included.")
    if result["max_abs_diff"] is not None:
        look, two = (figures[name]["times_base"] for name in (SECOND_LOOK, TWO_IMAGES))
        print(
            f"A second look takes {look:.2f} times base. The prompt with two images takes {two:.2f}, or {1 + two:.2f} "
            "after a first pass of which nothing is kept. Log-probabilities of the two differ by "
            f"{result['max_abs_diff']:.1e} at most."
        )
    for name, target in result["targets"].items():
        verdict = "holds" if result["reached"][name] else "does not hold"
        print(f"Target for `{name}`, at most {target} times base: {figures[name]['times_base']:.3f}, {verdict}.")
    print(
        f"{result['layers']} layers of width {result['width']}, {result['patches'] ** 2} image tokens, "
        f"{result['positions']} positions, batch {result['batch']}, {result['new_tokens']} tokens an answer, medians "
        f"of {result['rounds']} rounds, float32, {result['device']}, {result['threads']} cores, "
        f"{', '.join(f'{name} {version}' for name, version in result['versions'].items())}, {result['date']}"
    )


def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="12 layers of width 512 instead of 24 of width 1,024.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="Rounds; medians are taken over them.", min=1)] = 5,
    batch: Annotated[int, typer.Option(help="Questions that are answered together.", min=1)] = 2,
    new_tokens: Annotated[int, typer.Option(help="Tokens an answer.", min=1)] = 4,
    only: Annotated[
        list[str] | None, typer.Option(help="Beginning of the name of a contestant to measure beside base; repeatable.")
    ] = None,
    layers: Annotated[int, typer.Option(help="Decoder layers, instead of the size's.")] = 0,
    width: Annotated[int, typer.Option(help="Decoder width, a multiple of 64, instead of the size's.")] = 0,
    patches: Annotated[int, typer.Option(help="Patches a side of an image, instead of 24.")] = 0,
) -> None:
    """Prints a Markdown table and whether targets hold, then one JSON line; fails where answers differ."""
    shape = (QUICK if quick else FULL).resized(layers, width, patches)
    threads = use_all_cores()
    model = load_model(shape)
    pictures, questions = draw_pictures(batch), make_questions(batch)
    prompts = model.prepare(pictures, questions)
    positions = int(np.shape(model.as_inputs(prompts, bucketed=True).input_ids)[1])
    log.print(f"{shape.layers} layers of width {shape.width}, {batch} questions of {positions} positions")
    contestants = make_contestants(model, pictures, questions, new_tokens, only or ())
    preparing: list[float] = []
    spreads: list[float] = []
    with count_compilations() as compilations:
        measured, answers = warm_up(contestants, compilations, new_tokens)
        first, load = dataclasses.replace(compilations), Load()
        for number in range(rounds):
            began = time.perf_counter()
            model.prepare(pictures, questions)
            preparing.append(time.perf_counter() - began)
            spreads.append(run_round(contestants, measured, number))
        again = compilations.programs - first.programs
    busy = load.elsewhere()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # before ``weigh`` sets the mark back
    for name, run in contestants.items():
        measured[name].added = weigh(run)
    figures = {name: of_one.figures(batch) for name, of_one in measured.items()}
    both = SECOND_LOOK in answers and TWO_IMAGES in answers
    worst = difference(answers[SECOND_LOOK], answers[TWO_IMAGES]) if both else None
    targets = {name: target for name, target in TARGETS.items() if name in figures}
    result = {
        "shape": "custom" if layers or width or patches else "quick" if quick else "full",
        **dataclasses.asdict(shape),
        "positions": positions,
        "batch": batch,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "contestants": figures,
        "preparing_s_a_question": float(np.median(preparing)) / batch,
        "spread_of_base": float(np.median(spreads)),
        "compiled_while_timed": again,
        "compiling": dataclasses.asdict(first),
        "max_abs_diff": worst,
        "targets": targets,
        "reached": {name: figures[name]["times_base"] <= target for name, target in targets.items()},
        "peak_memory_bytes": peak,
        "device": jax.default_backend(),
        "versions": versions(),
        "threads": threads,
        "cores_busy_elsewhere": busy,
        "date": str(datetime.date.today()),
    }
    print_report(result)
    print(json.dumps(result))
    if worst is not None and not worst <= TOLERANCE:
        sys.exit(f"a second look and two images differ by {worst:.1e} in log-probability, more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    typer.run(bench)
