"""Pictures: attention laid over the image, and the summary figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from jaxmllm.analysis.curves import Curves, curves_of
from jaxmllm.analysis.geometry import TokenBoxes
from jaxmllm.analysis.study import PointingTable, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OVERLAY_SIDE = 336  # pixels of the longer side


def token_map(values: Float[np.ndarray, " N"], tokens: TokenBoxes, size: tuple[int, int]) -> Float[np.ndarray, "Y X"]:
    """A map over the patch tokens painted into an image of ``size`` (width, height)."""
    painted = np.zeros((size[1], size[0]))
    scale = np.array([size[0] / tokens.image_size[0], size[1] / tokens.image_size[1]] * 2)
    count = tokens.grid[0] * tokens.grid[1]
    for value, box in zip(values[-count:], np.rint(tokens.boxes[-count:] * scale).astype(int), strict=True):
        painted[box[1] : box[3], box[0] : box[2]] = value
    return painted


def overlay(
    image: Image.Image,
    values: Float[np.ndarray, " N"],
    tokens: TokenBoxes,
    evidence: Sequence[Sequence[float]] = (),
    caption: str = "",
) -> UInt8[np.ndarray, "Y X 3"]:
    """A map over the image tokens as heat over the image, with the evidence boxes drawn in.

    Args:
      image: the original image.
      values: any map; negative values count as none, and the highest is fully hot.
      tokens: pixel boxes of the tokens.
      evidence: pixel boxes.
      caption: one line above the picture.
    """
    from matplotlib import colormaps

    scale = OVERLAY_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    heat = token_map(np.maximum(values, 0.0), tokens, size)
    heat = heat / heat.max() if heat.max() > 0 else heat
    picture = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), float) / 255
    colours = colormaps["inferno"](heat)[..., :3]
    mixed = picture * (1 - 0.75 * heat[..., None]) + colours * 0.75 * heat[..., None]
    strip = 16
    canvas = Image.new("RGB", (size[0], size[1] + strip), "black")
    canvas.paste(Image.fromarray((mixed * 255).astype(np.uint8)), (0, strip))
    draw = ImageDraw.Draw(canvas)
    for left, top, right, bottom in evidence:
        corners = [left * scale, top * scale + strip, right * scale, bottom * scale + strip]
        draw.rectangle(corners, outline="lime", width=2)
    draw.text((4, 2), caption, fill="white")
    return np.asarray(canvas)


def summary_figure(study: Study, curves: Curves, pointing: PointingTable | None) -> Figure:
    """Masking, attention evolution, kinds of questions and the pointing game on one page."""
    from matplotlib.figure import Figure

    layers = np.arange(study.num_layers)
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    (accuracy, kinds), (evolution, points) = figure.subplots(2, 2)
    for name, values in curves.accuracy.items():
        style = "--" if name == "early" else "-"
        (line,) = accuracy.plot(
            layers, 100 * values, style, marker="o", label="early output" if name == "early" else name
        )
        low, high = 100 * curves.intervals["accuracy"][name]
        accuracy.fill_between(layers, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    accuracy.axhline(100 * curves.clean_accuracy, color="grey", linewidth=1, label="clean")
    for layer in curves.fusion or []:
        accuracy.axvspan(layer - 0.5, layer + 0.5, color="gold", alpha=0.25, linewidth=0)
    accuracy.set(title="Accuracy, image hidden at a layer (bands: 95%; gold: fusion layers)", ylabel="accuracy, %")
    accuracy.legend(fontsize=8)

    if "erase" in curves.accuracy:
        categories = study.categories
        heat = np.stack([curves_of(study, category).accuracy["erase"] for category in categories])
        shown = kinds.imshow(100 * heat, aspect="auto", cmap="viridis", vmin=0, vmax=100)
        kinds.set_yticks(range(len(categories)), categories)
        kinds.set(title="Accuracy after erasing the image at a layer, by kind of question")
        figure.colorbar(shown, ax=kinds, label="accuracy, %")
    else:
        kinds.set_visible(False)

    evolution.plot(layers, curves.hellinger, marker="o", color="tab:purple")
    evolution.set(title="Attention evolution: distance of A(i) to A(last)", ylabel="Hellinger distance", ylim=(0, None))
    for panel in (accuracy, kinds, evolution):
        panel.set_xticks(layers if len(layers) <= 16 else layers[:: max(1, len(layers) // 16)])
        panel.set_xlabel("decoder layer")

    if pointing:
        names = sorted(pointing.maps, key=lambda name: pointing.maps[name].mass)
        rows = np.arange(len(names))
        points.barh(
            rows + 0.2, [100 * pointing.maps[name].hits for name in names], 0.4, label="highest token on evidence"
        )
        points.barh(rows - 0.2, [100 * pointing.maps[name].mass for name in names], 0.4, label="mass on evidence")
        points.axvline(100 * pointing.object_chance, color="black", linestyle=":", label="chance: random object")
        points.axvline(100 * pointing.area_chance, color="grey", linestyle=":", label="chance: random pixel")
        points.set_yticks(rows, names, fontsize=8)
        points.set(title=f"Pointing game, {pointing.questions} questions", xlabel="%")
        points.legend(fontsize=7)
    else:
        points.set_visible(False)
    return figure
