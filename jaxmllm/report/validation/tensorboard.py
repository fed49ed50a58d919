"""A validation in TensorBoard: a chart is a site, a step is a layer; port and floor are runs that share their charts.

======================================  ==================================================================
``own/decoder/mlp_out/ratio``           the differences over what is allowed; above 1 departs
``own/decoder/mlp_out/max_error``       largest difference: of the port, and beside it the floor's
``run/...``                             the same from the prompts on
``own_log10/decoder/mlp_out``           histograms of log10 of the differences that are not zero
======================================  ==================================================================

Components outside of layers are charts with a single step, ``own/other/logits/ratio``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from tensorboardX import SummaryWriter

from jaxmllm.report.tables import plain_name
from jaxmllm.report.validation import markdown, words
from jaxmllm.report.validation.strips import ALLOWED_STEPS, KINDS, STEPS, Strip, comparisons, layer_strip, step
from jaxmllm.validation.components import split
from jaxmllm.validation.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# The steps of ``page.css``, on white.
COLOURS = (
    *("#edf3f7", "#dbe7ef", "#c5d9e6", "#a9c7da", "#86afc9"),
    *("#ffdf8e", "#ffb253", "#f5713f", "#cf2a2a", "#7a0b2e"),
)


def write(report: Report, logdir: Path, samples: Mapping[str, np.ndarray] = MappingProxyType({})) -> None:
    """Writes a validation.

    Args:
      report: of a validation.
      logdir: an existing folder.
      samples: ``KIND/COMPONENT`` -> some absolute differences, for histograms.
    """
    with SummaryWriter(str(logdir / "port")) as writer:
        writer.add_text("report", markdown.page(report))
        if any(split(each.component)[1] is not None for each in comparisons(report)):
            writer.add_figure("ratios", strip_figure(report))
        for each in comparisons(report):
            tag, layer = _chart(each.component)
            writer.add_scalar(f"{each.kind}/{tag}/ratio", float(each.ratio), layer)
            writer.add_scalar(f"{each.kind}/{tag}/max_error", float(each.errors.max), layer)
        for name, sample in samples.items():
            kind, _, component = name.partition("/")
            tag, layer = _chart(component)
            sizes = sample[np.isfinite(sample) & (sample > 0)]
            if sizes.size:
                writer.add_histogram(f"{kind}_log10/{tag}", np.log10(sizes), layer)
    with SummaryWriter(str(logdir / "floor")) as writer:
        for each in comparisons(report):
            floor = words.floor_of(report, each)
            if floor is not None:
                tag, layer = _chart(each.component)
                writer.add_scalar(f"{each.kind}/{tag}/max_error", float(floor.max), layer)


def _chart(component: str) -> tuple[str, int]:
    """The chart and the step of a component."""
    part, layer, site = split(component)
    if layer is None:
        return f"other/{plain_name(component)}", 0
    return f"{part}/{plain_name(site)}", layer


def strip_figure(report: Report) -> Figure:
    """The heat strips of both kinds of comparison, one above the other."""
    from matplotlib.figure import Figure

    strips = [strip for strip in (layer_strip(report, kind) for kind in KINDS) if strip.columns]
    width = min(20.0, 4.0 + 0.22 * max(len(strip.columns) for strip in strips))
    figure = Figure(figsize=(width, 1.2 + sum(1.2 + 0.24 * len(strip.sites) for strip in strips)), layout="constrained")
    heights = [2 + len(strip.sites) for strip in strips]
    panels = figure.subplots(len(strips), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, strip in zip(panels, strips, strict=True):
        shown = _draw(panel, strip)
    bar = figure.colorbar(shown, ax=list(panels), location="bottom", aspect=60, fraction=0.04)
    bar.set_ticks([place + 0.5 for place in range(len(STEPS) - 1)], labels=[f"{top:g}" for top in STEPS[:-1]])
    bar.set_label("ratio of the error to what is allowed; above 1 departs (outlined)", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def _draw(panel: Axes, strip: Strip) -> AxesImage:
    from matplotlib.colors import BoundaryNorm, ListedColormap

    heat = np.full((len(strip.sites), len(strip.columns)), np.nan)
    for x, column in enumerate(strip.columns):
        for y, site in enumerate(strip.sites):
            each = strip.cells.get((column, site))
            if each is not None:
                heat[y, x] = step(each.ratio)
    edges = np.arange(len(STEPS) + 1) - 0.5
    shown = panel.imshow(heat, aspect="auto", cmap=ListedColormap(COLOURS), norm=BoundaryNorm(edges, len(STEPS)))
    departs = heat >= ALLOWED_STEPS
    if departs.any():
        outline = np.pad(departs.repeat(8, axis=0).repeat(8, axis=1), 1).astype(float)
        reach = (-0.625, len(strip.columns) - 0.375, -0.625, len(strip.sites) - 0.375)
        panel.contour(outline, levels=[0.5], colors="black", linewidths=1, extent=reach)
    starts = [strip.columns.index(strip.of_part(part)[0]) for part in strip.parts]
    ticks = [x for x, (_, layer) in enumerate(strip.columns) if layer % 5 == 0]
    labels = [
        f"{strip.columns[x][0]}\n{strip.columns[x][1]}" if x in starts else str(strip.columns[x][1]) for x in ticks
    ]
    panel.set_xticks(ticks, labels, fontsize=8)
    panel.set_yticks(range(len(strip.sites)), strip.sites, fontsize=8)
    for start in starts[1:]:
        panel.axvline(start - 0.5, color="black", linewidth=1)
    panel.set_title(f"{strip.kind}: ratios by layer and site", fontsize=10, loc="left")
    return shown
