"""Trains the embedded model from scratch on generated scenes.

    python scripts/train_demo_model.py --out runs/demo-model              # about two hours on 2 cores; resumes
    python scripts/train_demo_model.py --out runs/smoke --preset smoke   # a minute: few objects, two kinds of questions
    python scripts/train_demo_model.py --out runs/zoom --preset zoom --start MODEL   # the last stage, from a folder

Stages. *vision*: the vision tower alone names what every patch shows, through heads that are thrown away later.
*joint*: the whole model answers questions, with a curriculum from few objects to many, while the patch loss goes
on at a lower weight. *settle*: the same at full difficulty, with a lower rate, more of the hard kinds
of questions, and a vision tower that learns faster again. *zoom*: small objects too, and prompts with two images, the
second a part of the first at a higher resolution, so that a model that is shown a crop knows what to do with it.

One sequence holds an image and several questions that cannot see each other, so that one image encoding supervises them
all. Only answers and the end token carry a loss.

Batches are drawn from (seed, stage, step), so a run that was stopped continues exactly as if it had not been.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import typer
from demo_export import IMAGE_TOKEN, MODEL_CONFIG, export_model, vocabulary
from flax import nnx
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxmllm.data.digits import DigitBitmaps, load_digit_bitmaps
from jaxmllm.data.scene_questions import QUESTION_KINDS, ask_all
from jaxmllm.data.scenes import (
    COLOUR_NAMES,
    KINDS,
    Scene,
    patch_targets,
    render,
    sample_scene,
)
from jaxmllm.model import load
from jaxmllm.models import forward, llava
from jaxmllm.models.images import place_images
from jaxmllm.models.inputs import Inputs
from jaxmllm.models.layers import Builder, Leaf

CONFIG = llava.read_config(MODEL_CONFIG)
WORDS = {word: index for index, word in enumerate(vocabulary())}
GRID = CONFIG.vision.grid
PREFIX = 2  # tokens before the first image
ROOM = 104  # for about ten questions
LARGE_SIDE = 4 * CONFIG.vision.image_size  # of the pictures that crops are cut from, in pixels
QUESTIONS = 12  # drawn for each image; those that do not fit are left out

# classes of the auxiliary heads, background first where a patch may show none
HEADS = {"colour": len(COLOUR_NAMES) + 1, "kind": len(KINDS) + 1, "centre": 2, "column": GRID, "row": GRID}
END_WEIGHT = 0.1  # of the end token's loss, beside 1 for the answer


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of training; sizes are in images.

    Attributes:
      objects: curriculum, pairs of (share of the stage from which it holds, range of objects a scene).
      patch_weight: weight of the patch loss; answers carry 1, or 0 in the vision stage.
      vision_rate: learning rate of the vision tower as a share of the rest's.
      weights: how often each kind of question is asked.
      two_views: share of the batches whose prompts show two images, the whole and a part.
      small: share of the scenes whose objects are small; ``sizes`` is the range of theirs, 1 being the usual.
    """

    name: str
    images: int
    batch: int
    rate: float
    objects: tuple[tuple[float, tuple[int, int]], ...]
    patch_weight: float
    vision_rate: float
    weights: dict[str, float]
    two_views: float = 0.0
    small: float = 0.0
    sizes: tuple[float, float] = (0.25, 0.5)


WEIGHTS = {kind: 1.0 for kind in QUESTION_KINDS} | {"count": 1.3, "above_below": 1.3, "left_right": 1.3}
HARD_KINDS_MORE_OFTEN = WEIGHTS | {
    "colour": 0.7, "shape": 0.8, "digit": 1.8, "digit_colour": 1.2, "extreme": 1.8,
    "above_below": 0.8, "left_right": 2.0,
}  # fmt: skip
EASY = {"colour": 1.0, "digit_colour": 1.0, "count": 0.2}  # every scene admits a count
ZOOM = Stage(
    "zoom", 26_400, 24, 1.2e-3, ((0.0, (2, 5)),), 0.2, 0.4,
    HARD_KINDS_MORE_OFTEN | {"shape": 1.4, "digit": 2.2}, two_views=0.55, small=0.65,
)  # fmt: skip
PRESETS = {
    "full": (
        Stage("vision", 51_200, 32, 4e-3, ((0.0, (4, 7)),), 1.0, 1.0, WEIGHTS),
        Stage("joint", 57_600, 24, 2.5e-3, ((0.0, (1, 2)), (0.1, (2, 3)), (0.25, (2, 5))), 0.5, 0.15, WEIGHTS),
        Stage("settle", 43_200, 24, 1.5e-3, ((0.0, (2, 5)),), 0.5, 0.4, HARD_KINDS_MORE_OFTEN),
        ZOOM,
    ),
    "zoom": (ZOOM,),
    "smoke": (
        Stage("vision", 3_200, 32, 4e-3, ((0.0, (4, 7)),), 1.0, 1.0, EASY),
        Stage("joint", 1_280, 16, 2.5e-3, ((0.0, (1, 2)),), 0.5, 0.3, EASY),
    ),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Images with their patch targets, and packed questions.

    Attributes:
      pixel_values: one view or two of every scene, the whole first; ``patches`` are of that.
      segment: 0 for what all questions of a sequence share, 1.. for each question, -1 for padding.
      target: the token that each position should predict; ``weight`` is 0 where none is asked for.
      kind: question kind of an answer position (index into QUESTION_KINDS), -1 elsewhere.
    """

    pixel_values: Leaf
    input_ids: Leaf
    segment: Leaf
    position: Leaf
    target: Leaf
    weight: Leaf
    kind: Leaf
    patches: dict[str, Leaf]


def draw_batch(rng: np.random.Generator, digits: DigitBitmaps, stage: Stage, objects: tuple[int, int]) -> Batch:
    """Draws scenes and packs their questions."""
    views = 2 if rng.random() < stage.two_views else 1
    rows = [draw_example(rng, digits, stage, objects, views) for _ in range(stage.batch)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def draw_part(rng: np.random.Generator, scene: Scene) -> tuple[int, int, int]:
    """Left, top and side in pixels of what a second view shows: mostly the surroundings of an object, at times the
    whole again, or any place."""
    side = int(LARGE_SIDE * rng.uniform(0.2, 0.6))
    kind = rng.random()
    if kind < 0.15:
        return 0, 0, LARGE_SIDE
    if kind < 0.3:
        centre = rng.uniform(0, LARGE_SIDE, 2)
    else:
        item = scene.objects[int(rng.integers(len(scene.objects)))]
        centre = np.array(item.centre) * LARGE_SIDE + rng.uniform(-0.3, 0.3, 2) * side
    left, top = np.clip(centre - side / 2, 0, LARGE_SIDE - side).astype(int).tolist()
    return left, top, side


def draw_views(rng: np.random.Generator, scene: Scene, views: int, small: bool) -> list[np.ndarray]:
    """The scene as the vision tower sees it, and where asked for a part of it: what the processor makes of a crop."""
    size = CONFIG.vision.image_size
    if views == 1 and not small:
        return [render(scene, size)]
    picture = Image.fromarray(render(scene, LARGE_SIDE))
    shown = [picture.resize((size, size), Image.Resampling.BICUBIC)]
    if views == 2:
        left, top, side = draw_part(rng, scene)
        part = picture.crop((left, top, left + side, top + side))
        shown.append(part.resize((size, size), Image.Resampling.BICUBIC))
    return [np.asarray(view) for view in shown]


def draw_example(
    rng: np.random.Generator, digits: DigitBitmaps, stage: Stage, objects: tuple[int, int], views: int
) -> Batch:
    """One scene with its questions; the arrays have no batch axis."""
    small = bool(rng.random() < stage.small)
    scene = sample_scene(rng, digits, objects, augment=True, scale=rng.uniform(*stage.sizes) if small else 1.0)
    pixels = np.stack(draw_views(rng, scene, views, small)).astype(np.float32) / 127.5 - 1.0
    targets = patch_targets(scene, GRID)
    prefix = [WORDS["<s>"], WORDS["USER:"]] + [WORDS[IMAGE_TOKEN]] * (CONFIG.tokens_per_image * views)
    length = len(prefix) + ROOM
    ids, segment, position = list(prefix), [0] * len(prefix), list(range(len(prefix)))
    answers: list[tuple[int, int, int]] = []  # (position that predicts, token, kind)
    asked = ask_all(rng, scene, QUESTIONS, stage.weights) if stage.name != "vision" else []
    for number, question in enumerate(asked, start=1):
        words = [WORDS[word] for word in (*question.text.split(), "ASSISTANT:", question.answer)]
        if len(ids) + len(words) > length:
            break
        answers.append((len(ids) + len(words) - 2, words[-1], QUESTION_KINDS.index(question.kind)))
        position += range(len(prefix), len(prefix) + len(words))
        ids += words
        segment += [number] * len(words)
    padding = length - len(ids)
    target, weight, kinds = np.zeros(length, np.int32), np.zeros(length, np.float32), np.full(length, -1)
    for at, token, kind in answers:
        target[at], weight[at], kinds[at] = token, 1.0, kind
        target[at + 1], weight[at + 1] = WORDS["</s>"], END_WEIGHT
    return Batch(
        pixel_values=pixels.transpose(0, 3, 1, 2),
        input_ids=np.array(ids + [WORDS["<pad>"]] * padding, np.int32),
        segment=np.array(segment + [-1] * padding, np.int32),
        position=np.array(position + [0] * padding, np.int32),
        target=target,
        weight=weight,
        kind=kinds,
        patches={name: np.asarray(getattr(targets, name)).reshape(-1) for name in HEADS},
    )


def batches(seed: int, stage_index: int, stage: Stage, steps: int, first: int) -> Iterator[Batch]:
    """Batches first..steps-1, drawn ahead in a thread."""
    digits = load_digit_bitmaps("train")
    ready: queue.Queue[Batch | Exception] = queue.Queue(maxsize=8)

    def work() -> None:
        try:
            for step in range(first, steps):
                objects = [span for start, span in stage.objects if step >= start * steps][-1]
                ready.put(draw_batch(np.random.default_rng([seed, stage_index, step]), digits, stage, objects))
        except Exception as error:  # raised again where the batch is awaited, which would else wait for ever
            ready.put(error)

    threading.Thread(target=work, daemon=True).start()
    for _ in range(first, steps):
        batch = ready.get()
        if isinstance(batch, Exception):
            raise batch
        yield batch


def cross_entropy(logits: jax.Array, target: jax.Array, weight: jax.Array) -> jax.Array:
    """Mean of the weighted losses."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    return jnp.sum(losses * weight) / jnp.maximum(jnp.sum(weight), 1.0)


def patch_loss(heads: dict[str, Any], features: jax.Array, targets: dict[str, jax.Array]) -> tuple[jax.Array, dict]:
    """Loss of the auxiliary heads on the features that the projector reads, and their accuracies on objects."""
    loss, accuracy = jnp.zeros(()), {}
    for name, head in heads.items():
        logits = features @ head["kernel"] + head["bias"]
        there = targets["colour"] > 0
        weight = jnp.where(there, 1.0, 0.0 if name in ("column", "row") else 0.3)
        loss = loss + cross_entropy(logits, jnp.maximum(targets[name], 0), weight)
        accuracy[name] = jnp.sum((logits.argmax(-1) == targets[name]) * there) / jnp.maximum(there.sum(), 1)
    return loss, accuracy


def answer_logits(module: llava.Llava, features: jax.Array, batch: Batch) -> jax.Array:
    """Next-token logits of packed questions, through the library's own decoder."""
    shared_or_same = (batch.segment[:, None, :] == 0) | (batch.segment[:, None, :] == batch.segment[:, :, None])
    length, views = batch.segment.shape[1], batch.pixel_values.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    mask = causal & shared_or_same & (batch.segment[:, None, :] >= 0)
    inputs = Inputs(batch.input_ids, mask[:, None], None, batch.position, None, views * CONFIG.tokens_per_image)
    layout = forward.layout_of(inputs, CONFIG.image_token_id)
    counts = np.full(len(features), CONFIG.tokens_per_image)
    embedded = module.decoder.embed(inputs.input_ids)
    embedded = place_images(embedded, module.projector(features), layout.image, counts)
    hidden, _ = module.decoder(embedded, layout)
    return module.decoder.logits(hidden)


def loss_of(params: dict, graphdef: nnx.GraphDef, stage: Stage, batch: Batch) -> tuple[jax.Array, dict]:
    """Loss of one batch, with running figures."""
    module = forward.merge(graphdef, params["model"])
    scenes, views = batch.pixel_values.shape[:2]
    features = module.vision_features(batch.pixel_values.reshape(scenes * views, *batch.pixel_values.shape[2:]))
    whole = features.reshape(scenes, views, *features.shape[1:])[:, 0]
    loss, figures = patch_loss(params["heads"], whole, batch.patches)
    loss = stage.patch_weight * loss
    if stage.name != "vision":
        logits = answer_logits(module, features, batch)
        loss = loss + cross_entropy(logits, batch.target, batch.weight)
        right = logits.argmax(-1) == batch.target
        for index, kind in enumerate(QUESTION_KINDS):
            of_kind = batch.kind == index
            figures[kind] = jnp.stack([jnp.sum(right & of_kind), jnp.sum(of_kind)])
    return loss, figures


def make_optimizer(stage: Stage, steps: int) -> optax.GradientTransformation:
    """AdamW, warmed up over a twentieth of the stage, then decayed to zero along a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, stage.rate, max(1, steps // 20), steps, 0.01 * stage.rate)
    in_vision = functools.partial(
        jax.tree_util.tree_map_with_path, lambda path, _: "vision" in jax.tree_util.keystr(path)
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=0.02),
        optax.masked(optax.scale(stage.vision_rate), in_vision),
    )


def initial_params(seed: int, start: Path | None = None) -> tuple[nnx.GraphDef, dict]:
    """Random weights of the model, or those of a folder, and of the auxiliary heads."""
    build = Builder(jnp.dtype("float32"), jnp.dtype("float32"), nnx.Rngs(seed))
    graphdef, model = forward.split(llava.Llava(CONFIG, build))
    model["decoder"]["embed"]["embedding"] *= 0.02 / jnp.std(model["decoder"]["embed"]["embedding"])
    if start is not None:
        model = load(start).params
    width = CONFIG.vision.hidden_size
    heads = {
        name: {"kernel": jnp.zeros((width, classes)), "bias": jnp.zeros(classes)} for name, classes in HEADS.items()
    }
    return graphdef, {"model": model, "heads": heads}


def run_stage(
    stages: tuple[Stage, ...],
    index: int,
    seed: int,
    save_every: int,
    graphdef: nnx.GraphDef,
    params: dict,
    store: ocp.CheckpointManager,
) -> dict:
    """Runs one stage from wherever the store left it; returns the trained parameters."""
    stage = stages[index]
    steps = stage.images // stage.batch
    optimizer = make_optimizer(stage, steps)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: dict, state: Any, batch: Batch) -> tuple[dict, Any, jax.Array, dict]:
        (loss, figures), grads = jax.value_and_grad(loss_of, has_aux=True)(params, graphdef, stage, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, figures

    state, first = optimizer.init(params), 0
    saved = store.latest_step() or 0
    if saved:
        restored = store.restore(saved, args=ocp.args.StandardRestore({"params": params, "state": state}))
        params, first = restored["params"], saved % STEP_STRIDE
        if saved // STEP_STRIDE > index:
            return params
        state = restored["state"] if first else state  # a finished stage leaves only its weights behind
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    window: list[dict] = []
    began = time.monotonic()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(stage.name, total=steps, completed=first)
        for step, batch in enumerate(batches(seed, index, stage, steps, first), start=first + 1):
            params, state, loss, figures = update(params, state, batch)
            window.append(figures)
            progress.advance(task)
            if step % 50 == 0 or step == steps:
                print(summary(stage.name, step, float(loss), window, time.monotonic() - began), flush=True)
                window = []
            if step % save_every == 0:
                store.save(index * STEP_STRIDE + step, args=ocp.args.StandardSave({"params": params, "state": state}))
    store.save((index + 1) * STEP_STRIDE, args=ocp.args.StandardSave({"params": params, "state": state}))
    store.wait_until_finished()
    return params


STEP_STRIDE = 1_000_000  # checkpoints are numbered stage * STEP_STRIDE + step


def summary(name: str, step: int, loss: float, window: list[dict], seconds: float) -> str:
    """One log line: JSON with the loss and the accuracies since the last line."""
    sums = jax.tree.map(lambda *values: np.sum(values, axis=0), *window)
    accuracy = {
        key: round(float(value[0] / max(value[1], 1) if np.ndim(value) else value / len(window)), 3)
        for key, value in sums.items()
    }
    return json.dumps({"stage": name, "step": step, "loss": round(loss, 4), "seconds": round(seconds)} | accuracy)


def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the finished model; a stopped run goes on.")],
    preset: Annotated[str, typer.Option(help="full, zoom (its last stage alone) or smoke.")] = "full",
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 400,
    seed: Annotated[int, typer.Option(help="Seed of weights and scenes.")] = 0,
    start: Annotated[
        Path | None, typer.Option(help="Folder of a model to begin with instead of random weights.")
    ] = None,
) -> None:
    """Trains the embedded model and writes it as a Hugging Face folder to OUT/model."""
    if preset not in PRESETS:
        raise typer.BadParameter(f"unknown preset {preset!r}; expected one of {', '.join(PRESETS)}")
    stages = PRESETS[preset]
    out.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    graphdef, params = initial_params(seed, start)
    with ocp.CheckpointManager((out / "checkpoints").absolute(), options=options) as store:
        done = (store.latest_step() or 0) // STEP_STRIDE
        for index in range(min(done, len(stages) - 1), len(stages)):
            params = run_stage(stages, index, seed, save_every, graphdef, params, store)
    export_model(params["model"], out / "model")
    print(f"wrote {out / 'model'}")


if __name__ == "__main__":
    typer.run(train)
