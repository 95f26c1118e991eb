"""Which file of a folder is which image of a COCO file: one look-up for all that reads images."""

import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from oln_d2.checks import InputError
from oln_d2.files import StrPath

NAMED = 3  # so many of the images that a message is about
_FRAME = re.compile(r"\d+\.jpg")  # a page or a frame of a video: "scan.tif/000002.jpg"
_OTHER_MACHINE = re.compile(r"[a-z][a-z0-9+.-]*:|/|\.\./", re.IGNORECASE)  # also a drive's letter
_UPLOAD = re.compile(r"[0-9a-f]{8}-(?=.)")  # that Label Studio puts before names


def find_images(
    folder: StrPath, images: Sequence[Mapping[str, Any]], source: StrPath, all_of_them: bool = True
) -> dict[int, str]:
    """
    Args:
        folder: where the images are.
        images: entries of `images` of a COCO file.
        source: the COCO file; named in errors.
        all_of_them: False leaves out those that are not there.

    Returns:
        by `id` the path of each image: that which `file_name` says, from `folder` on. What is not
        there, and what would be outside of the folder, is looked for below it, see
        :func:`match_images`. The pages of a file and the frames of a video ("scan.tif/000002.jpg")
        are there where the file is.

    Raises:
        InputError: no such folder, an entry that names no image, one that several files might be,
            two of the same image; and images that are not there.
    """
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder; the images of {source} are expected there")
    names = [_name(image, index, source) for index, image in enumerate(images)]
    start = os.path.join(os.path.abspath(folder), "")
    # One listing per folder instead of a look-up per image: quick on network file systems too.
    listings: dict[str, set[str]] = {}
    found: dict[int, str] = {}  # by index
    for index, name in enumerate(names):
        for way in name, os.path.join(*_parts(name)[0], ""):
            path = os.path.normpath(os.path.join(folder, way))
            if not os.path.abspath(path).startswith(start):
                continue  # a file from elsewhere has no say in what is read here
            own, file = os.path.split(path)
            if own not in listings:
                listings[own] = set(os.listdir(own)) if os.path.isdir(own) else set()
            if file in listings[own] or (_FRAME.fullmatch(file) and os.path.isfile(own)):
                found[index] = path
                break
    _check_different(found, names, source)
    missing = [index for index in range(len(images)) if index not in found]
    if missing:
        taken = set(map(os.path.abspath, found.values()))
        below = (path for path in _images_below(start) if path not in taken)
        matched = _match({index: names[index] for index in missing}, below, source)
        for index, path in matched.items():
            found[index] = os.path.join(folder, os.path.relpath(path, start))
        missing = [index for index in missing if index not in found]
    if missing and all_of_them:
        raise InputError(
            f"{folder}: {len(missing)} of {len(images)} images of {source} are missing, the "
            f"first: {', '.join(names[index] for index in missing[:NAMED])}; give the folder that "
            "these names start from and that holds them all, or fetch the images or remove the "
            "entries"
        )
    return {images[index]["id"]: path for index, path in sorted(found.items())}


def match_images(
    paths: Iterable[str], images: Sequence[Mapping[str, Any]], source: StrPath
) -> dict[int, str]:
    """
    Args:
        paths: absolute ones of images.
        images, source: see :func:`find_images`.

    Returns:
        by `id` the path of each image that is among `paths`: the one that ends with its
        `file_name`, or with the last folder and the file of it. Of a name from another machine (an
        absolute path, an address, `../`), the path with the longest end in common. Backslashes are
        read as "/", Label Studio's prefixes of uploads are left out where no file has them, and a
        name may lack its ending.

    Raises:
        InputError: see :func:`find_images`.
    """
    names = {index: _name(image, index, source) for index, image in enumerate(images)}
    found = _match(names, paths, source)
    return {images[index]["id"]: path for index, path in found.items()}


def walk(folder: StrPath) -> Iterator[tuple[str, list[str]]]:
    """
    Yields:
        each folder below this one, and itself, with the names of its files. Those that links lead
        to come last; each comes once, also where a link leads to a folder that it lies in.
    """
    seen: set[str] = set()
    tops = [os.fspath(folder)]
    for top in tops:  # grows
        for path, folders, files in os.walk(top):
            real = os.path.realpath(path)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            links = (os.path.join(path, name) for name in folders)
            tops += [link for link in links if os.path.islink(link)]
            yield path, sorted(files)


def some(names: Sequence[str]) -> str:
    """The first of them, and how many there are more."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def plural(number: int, noun: str) -> str:
    """As "1 image" or "2 images"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _images_below(folder: StrPath) -> Iterator[str]:
    from PIL import Image

    Image.init()
    for path, files in walk(folder):
        for file in files:
            if os.path.splitext(file)[1].lower() in Image.EXTENSION:
                yield os.path.join(path, file)


def image_name(image: Mapping[str, Any]) -> str:
    """The name in an entry of `images`: `file_name`, or LVIS' `coco_url`; "" where it has none."""
    names = image.get("file_name"), image.get("coco_url")
    return next((name for name in names if isinstance(name, str) and name), "")


def image_size(image: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width in pixels, where an entry of `images` has both."""
    height, width = image.get("height"), image.get("width")
    return (height, width) if height and width else None


def _name(image: Mapping[str, Any], index: int, source: StrPath) -> str:
    name = image_name(image)
    if not name:
        raise InputError(
            f"{source}: images[{index}] has no 'file_name' that is a text; write its name"
        )
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        name = "\0"
    if "\0" in name:
        raise InputError(
            f"{source}: images[{index}]: file_name {image_name(image)!r} is no name that a file "
            "can have; write its name"
        )
    return name


def _parts(name: str) -> tuple[list[str], bool]:
    """Folders and file of a name, and whether its folders are those of another machine."""
    name = name.replace("\\", "/")
    elsewhere = _OTHER_MACHINE.match(name) is not None
    if "://" in name or name.startswith("/data/"):  # Label Studio's, also "...?d=folder/a.jpg"
        address = urlsplit(name)
        name = parse_qs(address.query).get("d", [unquote(address.path)])[0]
    parts = posixpath.normpath(name).split("/")
    return [part for part in parts if part not in ("", ".", "..")], elsewhere


def _match(names: Mapping[int, str], paths: Iterable[str], source: StrPath) -> dict[int, str]:
    """By index the path of each name, see :func:`match_images`."""
    by_file, by_stem = defaultdict(list), defaultdict(list)
    for path in paths:
        parts = path.replace(os.sep, "/").split("/")
        by_file[parts[-1]].append((path, parts))
        by_stem[os.path.splitext(parts[-1])[0]].append((path, parts))
    # How well each name fits each path; a path is the image of the name that fits it best.
    fits: dict[int, dict[str, tuple[bool, int]]] = {}
    best: dict[str, tuple[bool, int]] = {}
    for index, name in names.items():
        own, elsewhere = _parts(name)
        if not own:
            continue
        file = own[-1]
        candidates = (
            by_file.get(file)
            or by_file.get(_UPLOAD.sub("", file, count=1))
            or by_stem.get(file)
            or []
        )
        fits[index] = {}
        for path, parts in candidates:
            common = 1
            while common < min(len(own), len(parts)) and own[-1 - common] == parts[-1 - common]:
                common += 1
            if common >= min(len(own), 2) or elsewhere:
                fit = common == len(own), common
                fits[index][path] = fit
                best[path] = max(fit, best.get(path, fit))
    ret = {}
    for index, own_fits in fits.items():
        kept = {path: fit for path, fit in own_fits.items() if fit == best[path]}
        most = max(kept.values(), default=None)
        paths = [path for path, fit in kept.items() if fit == most]
        if len(paths) > 1:
            raise InputError(
                f"{source}: images[{index}]: {names[index]} might be {paths[0]} or {paths[1]}; "
                "leave one out, or write the folder into its file_name"
            )
        if paths:
            ret[index] = paths[0]
    _check_different(ret, names, source)
    return ret


def _check_different(
    found: Mapping[int, str], names: Mapping[int, str] | Sequence[str], source: StrPath
) -> None:
    """Raises InputError where two entries are the same image: one would get the other's boxes."""
    first: dict[str, int] = {}
    for index, path in found.items():
        other = first.setdefault(os.path.normpath(path), index)
        if other != index:
            what = f"file_name {names[index]} occurs twice"
            if names[index] != names[other]:
                what = f"{names[index]} would be {path}, as {names[other]}"
            raise InputError(
                f"{source}: images[{index}]: {what}, first in images[{other}], so that there is no "
                "saying which image is meant; rename one, or give each its folder"
            )
