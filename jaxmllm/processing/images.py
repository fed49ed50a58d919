"""Pictures, however they are given, as upright RGB."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxmllm.errors import ProcessorError


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """An image file that stands inside another file, as those of MMBench's tables do.

    Attributes:
      name: what messages and results call it.
      data: the bytes of the image file.
    """

    name: str
    data: bytes = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return self.name


# Anything that shows one picture: a PIL image, an array [H, W, C] of uint8, the path of an image file, or its bytes.
ImageLike = Image.Image | np.ndarray | str | Path | StoredImage


def open_image(image: ImageLike) -> Image.Image:
    """An image as RGB, upright by its EXIF orientation; what is transparent is white, as in transformers' processors.

    Raises:
      ProcessorError: a file that is missing, broken or of no known format; an image without pixels.
    """
    if isinstance(image, (str, Path, StoredImage)):
        try:
            with Image.open(_file_of(image)) as opened:
                opened.load()
                picture: Image.Image = opened
        except FileNotFoundError:
            raise ProcessorError(f"{image}: no such image") from None
        except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
            # Pillow's decoders raise any of these on a broken file
            raise ProcessorError(f"{image}: broken, or not an image ({describe(error)})") from error
        where = str(image)
    elif isinstance(image, np.ndarray):
        where = f"image array of shape {image.shape}"
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
            raise ProcessorError(f"{where} and type {image.dtype}: expected uint8 of shape (height, width, 3)")
        if image.size == 0:
            raise ProcessorError(f"{where}: it has no pixels")
        picture = Image.fromarray(image.squeeze(-1) if image.ndim == 3 and image.shape[2] == 1 else image)
    elif isinstance(image, Image.Image):
        where, picture = "image", image
    else:
        raise ProcessorError(f"an image is a {type(image).__name__}; expected a PIL image, an array or a path")
    if 0 in picture.size:
        raise ProcessorError(f"{where}: it has no pixels ({picture.width} x {picture.height})")
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I;16"):  # Pillow would clip 16 bits to white rather than scale them
        upright = Image.fromarray((np.asarray(upright, np.float32) / 257).round().astype(np.uint8))
    elif upright.mode in ("I", "F"):
        raise ProcessorError(f"{where}: pixels of mode {upright.mode} have no known range; save it with 8 or 16 bits")
    if "A" in upright.getbands() or upright.info.get("transparency") is not None:
        layered = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered)
    return upright.convert("RGB")


def describe(error: Exception) -> str:
    """What Pillow says of a file; where it does not know the format it names an address in memory at times."""
    return "of no known format" if isinstance(error, UnidentifiedImageError) else str(error)


def _file_of(image: str | Path | StoredImage) -> str | Path | io.BytesIO:
    return io.BytesIO(image.data) if isinstance(image, StoredImage) else image


def as_list(entry: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    """One image, or several, as a list."""
    return list(entry) if isinstance(entry, (list, tuple)) else [entry]  # type: ignore[list-item]


EXIF_ORIENTATION = 0x0112


def image_size(image: ImageLike) -> tuple[int, int]:
    """Width and height of an image when it stands upright; of a file the pixels are not read.

    Raises:
      ProcessorError: as ``open_image``, as far as that can be told without the pixels.
    """
    if not isinstance(image, (str, Path, StoredImage)):
        return open_image(image).size
    try:
        with Image.open(_file_of(image)) as opened:
            width, height = opened.size
            turned = opened.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    except FileNotFoundError:
        raise ProcessorError(f"{image}: no such image") from None
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        raise ProcessorError(f"{image}: broken, or not an image ({describe(error)})") from error
    return (height, width) if turned else (width, height)
