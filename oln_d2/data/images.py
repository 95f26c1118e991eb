"""
Images, from whatever files and arrays, as upright 8-bit RGB or as they were annotated; and the size
that models see.
"""

import contextlib
import functools
import io
import math
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from oln_d2.checks import InputError
from oln_d2.files import StrPath

# Pillow reads a small preview of these.
RAW = set(".arw .cr2 .cr3 .dng .nef .nrw .orf .pef .raf .rw2 .srw".split())
# Photos that Pillow does not read by itself, so that they are named and not passed over.
PHOTOS = RAW | {".heic", ".heif", ".hif", ".jxl"}
_HEIF = {b"heic", b"heim", b"heis", b"heix", b"hevc", b"hevx", b"mif1", b"msf1"}  # their brands
# How an image is turned upright, by its EXIF orientation; those of 6 and 8 undo each other.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BACK = {6: 8, 8: 6}
_TOO_LARGE = "has more than {:.0f} million pixels; scale it down or cut it"
_PNG = b"\x89PNG\r\n\x1a\n"  # what it begins with
# Chunks of a PNG that the pixels depend on, and the orientation; the others are text and colours.
_PNG_CHUNKS = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT"}


class Page(NamedTuple):
    """An image of a file."""

    number: int | None  # from 0; None where the file has only this one
    image: Image.Image  # RGB, upright
    turn: int | None  # EXIF's orientation, where it is one by which the image was turned

    def of_size(
        self, size: tuple[int, int] | None, path: StrPath, source: StrPath
    ) -> tuple[Image.Image, bool]:
        """
        Args:
            size: height and width that the image has where it is annotated, if that is known.
            path: the image; named in errors.
            source: where the annotations come from; named in errors.

        Returns:
            the image in the frame of its annotations; and whether that is the frame in which it is
            stored, not the upright one: EXIF turns it, and only so it has the annotated size.

        Raises:
            InputError: it has another size either way.
        """
        if size is None or size == self.image.size[::-1]:
            return self.image, False
        if self.turn is not None and size == self.image.size:
            stored = self.image.transpose(_TURNS[_BACK.get(self.turn, self.turn)])
            if stored.size == size[::-1]:
                return stored, True
        (width, height), (says_height, says_width) = self.image.size, size
        remedy = "correct 'width' and 'height' there, or fetch the image again"
        if size == self.image.size:
            remedy = "it was turned after it was annotated: use the image as it was, or turn its "
            remedy += "boxes too"
        raise InputError(
            f"{path}: is {width} x {height} px, but {source} says {says_width} x {says_height}, so "
            f"that its boxes may not fit; {remedy}"
        )


def open_image(path: StrPath) -> Image.Image:
    """
    Args:
        path: an image file in any format that Pillow reads; of several pages or frames the first,
            or, as "scan.tif/000002.jpg", another. Transparent parts become white. Of more than 8
            bits an image is scaled down to them: 16-bit integers from [0, 65535], fractions from
            [0, 1]. Pixels as EXIF turns them, so that boxes are those of the image as it is looked
            at.

    Returns:
        RGB, upright.

    Raises:
        InputError: the file is missing, is no image or not a whole one, or has more pixels than
            Pillow takes for safe (`2 * PIL.Image.MAX_IMAGE_PIXELS`, 179 million).
    """
    return open_annotated(path, None, "")[0]


def decode_image(data: bytes, name: StrPath) -> Image.Image:
    """
    Args:
        data: what an image file holds; of several pages or frames the first is taken.
        name: named in errors.

    Returns, raises:
        as :func:`open_image`.
    """
    for page in _checked(io.BytesIO(data), name, every=1, only=0):
        return page.image
    raise InputError(f"{name}: holds no image; fetch it again")


def open_annotated(
    path: StrPath, size: tuple[int, int] | None, source: StrPath
) -> tuple[Image.Image, bool]:
    """The image of :func:`open_image` in the frame of its annotations, see :meth:`Page.of_size`."""
    file, number = os.fspath(path), 0
    folder, name = os.path.split(file)
    if os.path.isfile(folder) and re.fullmatch(r"\d+\.jpg", name):
        file, number = folder, int(name[:-4])
    for page in read_pages(file, only=number):
        return page.of_size(size, path, source)
    raise InputError(f"{path}: no such page or frame in this file")


def as_stored_note(path: StrPath, source: StrPath) -> str:
    """What to say of the first image of a data set that is not turned upright."""
    return (
        f"{path}: EXIF turns this image, but its annotations in {source} are of the unturned one: "
        "it and others like it are read as they are stored"
    )


def read_pages(path: StrPath, every: int = 1, only: int | None = None) -> Iterator[Page]:
    """
    Args:
        path: see :func:`open_image`.
        every: take one of so many frames of an animation.
        only: the number of the one page or frame that is wanted.

    Yields:
        the pages or frames, without reduced copies and masks of other pages.

    Raises:
        InputError: see :func:`open_image`.
    """
    yield from _checked(path, path, every, only)


def _checked(
    file: StrPath | io.BytesIO, path: StrPath, every: int, only: int | None
) -> Iterator[Page]:
    """The pages of a file, which errors name `path`."""
    try:
        if not isinstance(file, io.BytesIO):
            _check_file(file)
        pages = _read_pages(file, every, only)
        try:
            first = next(pages, None)
        except (OSError, SyntaxError, ValueError, struct.error):
            if _read_bytes(file, 8) != _PNG:
                raise
            whole = _without_metadata(_read_bytes(file))
            pages = _read_pages(whole, every, only)
            first = next(pages, None)
        if first is not None:
            yield first
            yield from pages
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such file") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path}: {_TOO_LARGE.format(_most_pixels() / 1e6)}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: {_what_else(_read_bytes(file, 64))}") from None
    except Exception as error:  # the readers of the formats raise all kinds
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path}: cannot be read as an image ({reason}); fetch it again") from None


def check_pixels(width: int, height: int) -> None:
    """Raises InputError for a frame of a video that is larger than Pillow lets an image be."""
    if width * height > _most_pixels():
        raise InputError(_TOO_LARGE.format(_most_pixels() / 1e6))


def _most_pixels() -> float:
    return 2 * (Image.MAX_IMAGE_PIXELS or math.inf)


def _check_file(path: StrPath) -> None:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise InputError("is a folder, a pipe or a device, not a file")
    if os.path.splitext(path)[1].lower() in RAW:
        raise InputError(
            "is a camera's raw file, of which only a preview can be read; develop it to JPEG or "
            "TIFF"
        )


def _read_bytes(file: StrPath | io.BytesIO, number: int | None = None) -> bytes:
    """The first so many bytes, or all."""
    if isinstance(file, io.BytesIO):
        return file.getvalue()[:number]
    with open(file, "rb") as f:
        return f.read(number)


def _read_pages(file: Any, every: int, only: int | None) -> Iterator[Page]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of half the pixels that it refuses, and of tags
        try:
            image = Image.open(file)
        except UnidentifiedImageError:
            if not _register_heif():
                raise
            image = Image.open(file)
        if image.format == "EPS":
            raise InputError(
                "is PostScript, a program that would have to be run to see what it draws; convert "
                "it to PNG"
            )
        numbers = [0] if only == 0 else _numbers(image)
    with image:
        for number in numbers if only is None else [only] if only in numbers else []:
            # Pages are documents of their own, frames are alike.
            if image.format == "TIFF" or number % every == 0:
                yield Page(number if len(numbers) > 1 else None, *_read(image, number))


def _numbers(image: Image.Image) -> list[int]:
    """Numbers of the pages or frames: gain maps and the like, and layers, are none."""
    count = getattr(image, "n_frames", 1)
    if count == 1 or image.format in ("MPO", "PSD"):
        return [0]
    if image.format != "TIFF":
        return list(range(count))
    ret = [0]
    for number in range(1, count):
        image.seek(number)
        kind = image.tag_v2.get(254, 0)  # 1: a reduced copy, 4: a mask
        if not (isinstance(kind, int) and kind & 5):
            ret.append(number)
    return ret


def _read(image: Image.Image, number: int) -> tuple[Image.Image, int | None]:
    """A page, RGB and upright, and the orientation by which it was turned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if number != image.tell():
            image.seek(number)
        before = _orientation(image)
        image.load()
        after = _orientation(image)  # that of a PNG may come behind its pixels
        # What was there before only, Pillow has applied: it does so for TIFF.
        rgb = _to_rgb(image)
        return (rgb.transpose(_TURNS[after]) if after else rgb), after or before


def _orientation(image: Image.Image) -> int | None:
    try:
        value = image.getexif().get(0x0112)
        return value if value in _TURNS else None
    except Exception:  # whatever is wrong with EXIF, the pixels are there
        return None


def _without_metadata(data: bytes) -> io.BytesIO:
    """A PNG without the chunks that do not matter here: oddities in them must not hide pixels."""
    kept, start = [_PNG], len(_PNG)
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])
        chunk = data[start:end]
        kind = chunk[4:8]
        if kind in _PNG_CHUNKS:
            is_sound = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
            if is_sound or kind[:1].isupper():  # capital: pixels cannot do without it
                kept.append(chunk)
        start = end
    return io.BytesIO(b"".join(kept))


@functools.cache
def _register_heif() -> bool:
    """Whether Pillow now reads HEIC, too."""
    with contextlib.suppress(ImportError):
        import pillow_heif  # type: ignore[import-not-found,unused-ignore]

        pillow_heif.register_heif_opener()
        return True
    return False


def _what_else(head: bytes) -> str:
    """What a file that begins so is, which Pillow takes for no image, and the remedy."""
    if not head:
        return "is empty; fetch it again"
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF:
        return (
            "is HEIC, which needs a package more: python -m pip install pillow-heif; or convert it "
            "to JPEG"
        )
    if head[4:8] == b"ftyp":
        return "is a video, no image; propose reads it by an ending as .mp4, and draws its frames"
    if head.startswith(b"version https://git-lfs"):
        return "is Git LFS' pointer to an image; fetch that: git lfs pull"
    if head.lstrip()[:1] == b"<":
        return "is text such as a web page, no image; fetch it again"
    return "is no image in a format that can be read here; convert or fetch it again"


def to_image(image: Any) -> Image.Image:
    """
    Args:
        image: a PIL image; an array (H, W, 3) or (H, W), RGB or grey; or a tensor (3, H, W), RGB;
            both uint8 or float in [0, 1].

    Returns:
        RGB.

    Raises:
        InputError: it is something else.
    """
    if isinstance(image, Image.Image):
        return _to_rgb(image)
    if hasattr(image, "detach"):  # a tensor: its channels come first
        pixels = image.detach().cpu().numpy()
        pixels = np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 else pixels[:0]
    else:
        pixels = np.asarray(image)
    if pixels.dtype.kind == "f" and pixels.size:
        if not (0 <= pixels.min() and pixels.max() <= 1):
            raise InputError(
                f"an image of shape {list(np.shape(image))} has floats outside [0, 1]; divide "
                "8-bit images by 255"
            )
        pixels = (pixels * 255).round().astype(np.uint8)
    grey = pixels.ndim == 2
    if pixels.dtype != np.uint8 or not (grey or pixels.shape[2:] == (3,)) or not pixels.size:
        what = type(image).__name__
        if hasattr(image, "dtype"):
            what += f" of shape {list(image.shape)} and type {image.dtype}"
        raise InputError(
            f"an image is {what}; it has to be a path, a PIL image, an array (H, W, 3) or a tensor "
            "(3, H, W), RGB, uint8 or float in [0, 1]"
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
