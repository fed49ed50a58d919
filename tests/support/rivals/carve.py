"""CARVE: contrasts a question's attention with a general instruction's, and keeps the parts that stand out.

YuyaoGe/CARVE@a1f0442: carve/attention.py and carve/masking.py (its version "v4").
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image


def fuse(
    question_maps: Sequence[Sequence[np.ndarray]],
    general_maps: Sequence[Sequence[np.ndarray]],
    grid: tuple[int, int],
    image_size: tuple[int, int],
    layers: Sequence[int],
    lam: float = 1e-8,
) -> np.ndarray:
    """Contrast at each pixel ``[height, width]`` of maps ``[T][L][N]``, the later of the common steps weighing more.

    ``grid`` is (rows, columns), ``image_size`` is (width, height); layers that the model lacks are passed over.
    """
    width, height = image_size
    fused = np.zeros((height, width))
    for step, (question, general) in enumerate(zip(question_maps, general_maps, strict=False)):
        for layer in layers:
            if layer < min(len(question), len(general)):
                ratio = question[layer].astype(np.float32) / (general[layer].astype(np.float32) + np.float32(lam))
                pixels = Image.fromarray(ratio.reshape(grid)).resize((width, height), Image.Resampling.BILINEAR)
                fused += (step + 1) * np.asarray(pixels, np.float64)
    return fused


def keep_mask(fused: np.ndarray, top: float = 0.2, fewest: int = 3) -> np.ndarray:
    """1 for pixels ``[height, width]`` to keep: those of the regions above the percentile that hold most contrast.

    Of n regions the best ``max(fewest, int(top n))`` stay, of equals those met first in reading order.
    """
    regions = components(fused >= np.percentile(fused, (1 - top) * 100))
    sums = []
    for region in regions:
        total = 0.0
        for row, column in region:
            total += fused[row, column]
        sums.append(total)
    order = sorted(range(len(regions)), key=lambda index: -sums[index])
    mask = np.zeros(fused.shape, np.uint8)
    for index in order[: max(fewest, int(len(regions) * top))]:
        for row, column in regions[index]:
            mask[row, column] = 1
    return mask


def components(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """The regions connected by edges, in the order in which reading meets them; each one's pixels in that order."""
    height, width = mask.shape
    seen = np.zeros(mask.shape, bool)
    regions = []
    for start in zip(*map(np.ndarray.tolist, np.nonzero(mask)), strict=True):
        if seen[start]:
            continue
        seen[start] = True
        region, frontier = [start], [start]
        while frontier:
            row, column = frontier.pop()
            for place in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if 0 <= place[0] < height and 0 <= place[1] < width and mask[place] and not seen[place]:
                    seen[place] = True
                    region.append(place)
                    frontier.append(place)
        regions.append(sorted(region))
    return regions


def refine(image: Image.Image, mask: np.ndarray) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """The RGB image black outside the mask, cropped to it and enlarged to cover the original size; and the crop."""
    rows, columns = np.nonzero(mask)
    box = (0, 0, mask.shape[1], mask.shape[0])
    if len(rows):
        box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    crop = Image.fromarray(np.asarray(image) * mask[:, :, None].astype(np.uint8)).crop(box)
    # one factor for both sides: the refined image is as large as the original in one and larger in the other
    scale = max(image.width / crop.width, image.height / crop.height)
    size = int(crop.width * scale), int(crop.height * scale)
    return crop.resize(size, Image.Resampling.LANCZOS), box
