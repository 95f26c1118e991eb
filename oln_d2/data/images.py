"""Images, from whatever files and arrays, as upright 8-bit RGB; and the size that models see."""

import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from oln_d2.checks import InputError
from oln_d2.files import StrPath


def open_image(path: StrPath) -> Image.Image:
    """
    Args:
        path: an image file in any format that Pillow reads. Transparent parts become white.
            Of more than 8 bits an image is scaled down to them: 16-bit integers from [0, 65535],
            fractions from [0, 1]. Pixels as EXIF turns them, so that boxes are those of the image
            as it is looked at.

    Returns:
        RGB, upright.

    Raises:
        InputError: the file is missing, is no image or not a whole one, or has more pixels than
            Pillow takes for safe (`2 * PIL.Image.MAX_IMAGE_PIXELS`, 179 million).
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # Pillow's, of half the pixels that it refuses
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such file") from None
    except Image.DecompressionBombError:
        raise InputError(
            f"{path}: has more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels; scale "
            "it down or cut it"
        ) from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except UnidentifiedImageError:
        raise InputError(
            f"{path}: is no image in a format that can be read here; convert or fetch it again"
        ) from None
    except Exception as error:  # the readers of the formats raise all kinds
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path}: cannot be read as an image ({reason}); fetch it again") from None


def to_image(image: Any) -> Image.Image:
    """
    Args:
        image: a PIL image; an array (H, W, 3) or (H, W), uint8, RGB or grey; or a tensor (3, H, W),
            RGB, uint8 or float in [0, 1].

    Returns:
        RGB.

    Raises:
        InputError: it is something else.
    """
    if isinstance(image, Image.Image):
        return _to_rgb(image)
    if hasattr(image, "detach"):  # a tensor: its channels come first
        pixels = image.detach().cpu().numpy()
        if pixels.dtype.kind == "f":
            if not (pixels.size and 0 <= pixels.min() and pixels.max() <= 1):
                raise InputError(
                    "an image is an empty float tensor or has values outside [0, 1]; divide 8-bit "
                    "images by 255"
                )
            pixels = (pixels * 255).round().astype(np.uint8)
        pixels = np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 else pixels[:0]
    else:
        pixels = np.asarray(image)
    grey = pixels.ndim == 2
    if pixels.dtype != np.uint8 or not (grey or pixels.shape[2:] == (3,)) or not pixels.size:
        raise InputError(
            f"an image is {type(image).__name__} of shape {list(getattr(image, 'shape', []))} and "
            f"type {getattr(image, 'dtype', None)}; it has to be a PIL image, an array (H, W, 3), "
            "uint8, RGB, or a tensor (3, H, W), uint8 or float in [0, 1]"
        )
    return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")


def resized_shape(height: int, width: int, min_size: float, max_size: float) -> tuple[int, int]:
    """
    Returns:
        height and width after Detectron2's `ResizeShortestEdge`: the shorter side becomes
        `min_size` pixels, or the longer one `max_size` if it would become more; 1 at least.
    """
    new = [float(min_size), float(min_size)]
    longer = 0 if height >= width else 1
    new[longer] = min_size / min(height, width) * max(height, width)
    if new[longer] > max_size:
        scale = max_size / new[longer]
        new = [side * scale for side in new]
    return max(int(new[0] + 0.5), 1), max(int(new[1] + 0.5), 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        pixels = np.asarray(image)
        if not np.isfinite(pixels).all():
            raise InputError("has pixels that are not finite numbers")
        highest = 1.0 if image.mode == "F" else 65535.0
        if pixels.min() < 0 or pixels.max() > highest:
            raise InputError(
                f"has values from {pixels.min():g} to {pixels.max():g}; expected 0 to {highest:g}"
            )
        image = Image.fromarray((pixels / highest * 255).round().astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
