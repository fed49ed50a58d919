"""ViCrop: where a model looks for a question's answer, and the crop of the image around it.

saccharomycetes/mllms_know@a64c5d5: llava_methods.py, blip_methods.py and utils.py. Maps are flat, ``[N]`` for the N
image tokens (or the patches that a Q-Former reads), in reading order; inputs are one example without padding.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import median_filter

RATIOS = (1, 1.2, 1.4, 1.6, 1.8, 2)

Number = int | float
Inputs = Mapping[str, torch.Tensor]


def crop_box(att_map: np.ndarray, image_size: tuple[int, int], base: int) -> tuple[Number, Number, Number, Number]:
    """Left, top, right and bottom of the crop; whole numbers, of which some are floats."""
    rows, columns = att_map.shape
    width, height = image_size
    cell_width, cell_height = width / columns, height / rows

    windows, sharpness = [], []
    for ratio in RATIOS:
        across = min(int(base * ratio / cell_width), columns)
        down = min(int(base * ratio / cell_height), rows)
        if (across, down) == (columns, rows):
            if ratio == 1:
                return 0, 0, width, height
            continue
        sums = {}
        for x in range(columns - across + 1):
            for y in range(rows - down + 1):
                sums[x, y] = att_map[y : y + down, x : x + across].sum()
        place, most = (0, 0), -math.inf
        for candidate, total in sums.items():
            if total > most:
                place, most = candidate, float(total)
        x, y = place
        around = [sums[near] for near in ((x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1)) if near in sums]
        with np.errstate(divide="ignore", invalid="ignore"):  # a crop smaller than a cell, or a map that divided by 0
            sharpness.append((most - np.mean(around, dtype=np.float64)) / (across * down))
        windows.append((x, y, across, down, base * ratio))

    x, y, across, down, side = windows[int(np.argmax(sharpness))]  # the first not-a-number before the largest
    left, right = span(int(x * cell_width + cell_width * across / 2), side, width)
    top, bottom = span(int(y * cell_height + cell_height * down / 2), side, height)
    return left, top, right, bottom


def span(centre: Number, side: Number, limit: int) -> tuple[Number, Number]:
    """A side of the crop around ``centre``, moved and then cut to lie in the image."""
    half = side // 2
    if centre < half:
        centre = half
    if centre > limit - half:
        centre = limit - half
    return max(0, centre - half), min(limit, centre + half)


def high_pass(image: Image.Image, resolution: int) -> np.ndarray:
    """How much each pixel ``[R, R]`` of the resized RGB image differs from its surroundings."""
    resized = np.asarray(image.resize((resolution, resolution), Image.Resampling.BILINEAR), np.float32) / 255
    pixels = torch.from_numpy(resized).permute(2, 0, 1)
    sigma = 0.3 * ((3 - 1) * 0.5 - 1) + 0.8
    line = torch.exp(-0.5 * (torch.tensor([-1.0, 0.0, 1.0]) / sigma) ** 2)
    line = line / line.sum()
    padded = torch.nn.functional.pad(pixels[:, None], (1, 1, 1, 1), mode="reflect")
    blurred = torch.nn.functional.conv2d(padded, torch.outer(line, line)[None, None])[:, 0]
    return median_filter(np.sqrt(np.square((pixels - blurred).numpy()).sum(0)), size=7)


def pure_gradient_map(
    question_grad: np.ndarray, general_grad: np.ndarray, high_pass: np.ndarray, patch: int
) -> np.ndarray:
    """Mean over patches of the ratio of two gradients ``[3, R, R]``, where ``high_pass [R, R]`` exceeds its median.

    A last row or column of patches that the pixels do not fill is filled with zeros, which count in the mean.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.linalg.norm(question_grad, axis=0) / np.linalg.norm(general_grad, axis=0)
        ratio = ratio * (high_pass > np.median(high_pass))
    rows, columns = (math.ceil(size / patch) for size in ratio.shape)
    means = np.zeros((rows, columns))
    for row, column in np.ndindex(rows, columns):
        block = ratio[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        means[row, column] = block.sum() / patch**2
    return means


def pixel_gradient(model: torch.nn.Module, inputs: Inputs) -> np.ndarray:
    """Of the likeliest token's log-probability by the preprocessed pixels, ``[3, R, R]``."""
    pixels = inputs["pixel_values"].detach().requires_grad_()
    logits = model(**{**inputs, "pixel_values": pixels}).logits
    return torch.autograd.grad(answer(logits), pixels)[0][0].numpy()


def relative_attention(
    model: torch.nn.Module, inputs: Inputs, general_inputs: Inputs, layer: int, image_token_id: int
) -> np.ndarray:
    """The last token's mean attention to each image token, for the question over for the general prompt."""
    maps = []
    with torch.no_grad():
        for given in (inputs, general_inputs):
            attention = model(**given, output_attentions=True).attentions[layer]
            maps.append(to_image(attention, given, image_token_id).mean(0))
    return (maps[0] / maps[1]).numpy()


def gradient_attention(model: torch.nn.Module, inputs: Inputs, layer: int, image_token_id: int) -> np.ndarray:
    """The last token's attention to each image token, times its gradient where that is positive, mean over heads."""
    outputs = model(**inputs, output_attentions=True)
    weighted = by_gradient(outputs.logits, outputs.attentions[layer])
    return to_image(weighted, inputs, image_token_id).mean(0).numpy()


def qformer_relative_attention(
    model: torch.nn.Module,
    inputs: Inputs,
    general_inputs: Inputs,
    layer: int,
    cross_layer: int,
    image_token_id: int,
) -> np.ndarray:
    """InstructBLIP's attention to each patch by way of the queries, for the question over for the general prompt.

    ``cross_layer`` counts the Q-Former's layers that have cross-attention.
    """
    maps = []
    with torch.no_grad():
        for given in (inputs, general_inputs):
            with cross_attention(model, cross_layer) as seen:
                attention = model(**given, output_attentions=True).language_model_outputs.attentions[layer]
            maps.append(to_image(attention, given, image_token_id).mean(0) @ to_patches(seen[0]))
    return (maps[0] / maps[1]).numpy()


def qformer_gradient_attention(
    model: torch.nn.Module, inputs: Inputs, layer: int, cross_layer: int, image_token_id: int
) -> np.ndarray:
    """InstructBLIP's attention to each patch by way of the queries, both attentions times their gradients."""
    with cross_attention(model, cross_layer) as seen:
        outputs = model(**inputs, output_attentions=True)
    attention = outputs.language_model_outputs.attentions[layer]
    weighted, weighted_cross = by_gradient(outputs.logits, attention), by_gradient(outputs.logits, seen[0])
    return (to_image(weighted, inputs, image_token_id).mean(0) @ to_patches(weighted_cross)).numpy()


@contextlib.contextmanager
def cross_attention(model: torch.nn.Module, cross_layer: int) -> Iterator[Sequence[torch.Tensor]]:
    """Collects the weights ``[1, heads, queries, 1 + patches]`` of a Q-Former layer, as they stand in the graph."""
    seen: list[torch.Tensor] = []
    having = [layer for layer in model.qformer.encoder.layer if layer.has_cross_attention]
    module = having[cross_layer].crossattention.attention
    handle = module.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    try:
        yield seen
    finally:
        handle.remove()


def answer(logits: torch.Tensor) -> torch.Tensor:
    """The log-probability of the likeliest next token."""
    return logits[0, -1].log_softmax(-1).max()


def by_gradient(logits: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """Attention times the positive part of the answer's gradient by it."""
    (gradient,) = torch.autograd.grad(answer(logits), attention, retain_graph=True)
    return attention.detach() * gradient.relu()


def to_image(attention: torch.Tensor, inputs: Inputs, image_token_id: int) -> torch.Tensor:
    """The last token's attention to the image tokens, ``[heads, N]``."""
    return attention[0, :, -1, inputs["input_ids"][0] == image_token_id]


def to_patches(attention: torch.Tensor) -> torch.Tensor:
    """The queries' mean attention to the patches, without the class token: ``[queries, N]``."""
    return attention[0, :, :, 1:].mean(0)
