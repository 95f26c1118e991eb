"""Reading image files, whatever they hold, as upright 8-bit RGB."""

import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from oln_d2.errors import InputError


def open_image(path):
    """
    Args:
        path (str): an image file in any format that Pillow reads. Transparent parts become white.
            Of more than 8 bits an image is scaled down to them: 16-bit integers from [0, 65535],
            fractions from [0, 1]. Pixels as EXIF turns them, so that boxes are those of the image
            as it is looked at.

    Returns:
        PIL.Image.Image: RGB, upright.

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


def _to_rgb(image):
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
