"""From what a user names to the images to propose on."""

import glob
import mimetypes
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from oln_d2.checks import InputError, needs
from oln_d2.data.images import PHOTOS, Page, check_pixels, read_pages
from oln_d2.data.lookup import some, walk
from oln_d2.files import StrPath

VIDEOS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"}
# Endings of what is certainly neither.
_OTHERS = {
    ending
    for ending, kind in mimetypes.MimeTypes().types_map[True].items()
    if not kind.startswith(("image/", "video/"))
}
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


class Source(NamedTuple):
    """An image file, perhaps of several pages or frames, or a video."""

    path: str  # absolute
    name: str  # relative to the folder that all sources are in; with "/"
    is_video: bool


def find_sources(
    patterns: Sequence[str], output: StrPath | None = None
) -> tuple[str, list[Source]]:
    """
    Args:
        patterns: image files, videos, folders (with all below them), globs, and text files
            ("list.txt" or "@list") that name some of these, one a line, from the current folder or
            theirs on.
        output: a folder in which nothing is looked for, as it will hold pictures of proposals.

    Returns:
        the folder that all are in, and each once, in the order of `patterns`, those of a folder or
        a glob by name. In a folder, files count whose ending is that of an image format or a video,
        and those of other endings, or none, that prove to be one; files named explicitly are always
        used.

    Raises:
        InputError: a pattern that nothing matches, a folder without images, an address or a camera,
            or a file name that cannot be written to other files.
    """
    paths = list(dict.fromkeys(map(os.path.abspath, _find_paths(patterns))))
    if output is not None:
        own = os.path.join(os.path.abspath(output), "")
        paths = [path for path in paths if not path.startswith(own)]
    if not paths:
        where = "here" if output is None else f"outside of {output}"
        raise InputError(f"{', '.join(patterns)}: there is no image or video {where}")
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError:
            raise InputError(f"{path!a}: has a name that is not UTF-8; rename it") from None
    try:
        root = os.path.commonpath([os.path.dirname(path) for path in paths])
    except ValueError:  # on Windows
        raise InputError(f"{paths[0]} and others lie on different drives; give one's own") from None
    sources = [
        Source(path, os.path.relpath(path, root).replace(os.sep, "/"), _is_video(path))
        for path in paths
    ]
    return root, sources


def evenly(values: Sequence[Any], number: int | None) -> list[Any]:
    """At most so many of them, at equal distances; None: all."""
    number = min(number or len(values), len(values))
    return [values[i * len(values) // number] for i in range(number)]


def _find_paths(patterns: Iterable[str], lists: frozenset[str] = frozenset()) -> Iterator[str]:
    """`lists`: the text files that the patterns come from."""
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        is_list = os.path.isfile(pattern) and pattern.lower().endswith(".txt")
        if is_list or (not matches and pattern.startswith("@")):
            path = pattern if is_list else pattern[1:]
            real = os.path.realpath(path)
            if real in lists:
                raise InputError(f"{path}: is a list that names itself; remove that line")
            yield from _find_paths(_read_list(path), lists | {real})
        elif not matches or _is_device(pattern):
            raise InputError(f"{pattern}: {_why_nothing(pattern)}")
        else:
            for match in sorted(matches):
                inside = _in_folder(match) if os.path.isdir(match) else [match]
                if not inside and match == pattern:
                    raise InputError(f"{match}: no image or video is in this folder")
                yield from inside


def _is_device(path: str) -> bool:
    return os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))


def _why_nothing(pattern: str) -> str:
    if _ADDRESS.match(pattern):
        return "addresses are not read; fetch the file first, or record the stream, and give that"
    if pattern == "-":
        return "standard input is not read; write the image to a file and give that"
    if pattern.isdecimal() or os.path.exists(pattern):
        return "cameras, pipes and devices are not read; record a video first and give that"
    return "no such file or folder, and no file matches it as a glob"


def _read_list(path: str) -> list[str]:
    """The paths in a text file."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InputError(
            f"{path}: cannot be read as a list of paths ({reason}); give a text file with one a "
            "line"
        ) from None
    paths: list[str] = []
    missing: list[str] = []
    for line in filter(None, map(str.strip, lines)):
        ways = os.path.expanduser(line), os.path.join(os.path.dirname(path), line)
        there = (way for way in ways if os.path.lexists(way) or glob.glob(way, recursive=True))
        way = next(there, None)
        (missing if way is None else paths).append(way or line)
    if missing or not paths:
        raise InputError(
            f"{path}: is read as a list of paths, one a line, of which {len(missing)} of "
            f"{len(missing) + len(paths)} are missing: {some(missing)}"
        )
    return paths


def _in_folder(folder: str) -> list[str]:
    """The images and videos in a folder and all below it, by name."""
    Image.init()
    # Photos of phones, too: that Pillow cannot read them without a plug-in is said at the end.
    endings = VIDEOS | PHOTOS | set(Image.EXTENSION) - {".pdf"}
    others: set[str] = set()  # endings of what is neither, so that many texts are not all opened
    ret = []
    for path, files in walk(folder):
        for file in files:
            ending = os.path.splitext(file)[1].lower()
            if file.startswith(".") or ending in others:
                continue
            whole = os.path.join(path, file)
            if ending in endings or (_is_image(whole) if not ending else _is_video(whole)):
                ret.append(whole)
            elif ending:
                others.add(ending)
    return sorted(ret)


def _is_image(path: str) -> bool:
    try:
        with warnings.catch_warnings(), Image.open(path):
            warnings.simplefilter("ignore")
            return True
    except Exception:  # the readers of the formats raise all kinds
        return False


def _is_video(path: str) -> bool:
    """By its ending; where Pillow does not know that, and the file is no image, by opening it."""
    ending = os.path.splitext(path)[1].lower()
    if ending in VIDEOS:
        return True
    if ending in _OTHERS or ending in PHOTOS or ending in Image.registered_extensions():
        return False
    if not os.path.isfile(path) or _is_image(path):
        return False
    try:
        import av
    except ImportError:
        return False
    try:
        with av.open(path) as video:
            # Neither a picture, nor text as a terminal shows it, nor music with its cover.
            return not re.search("_pipe|image2|tty", video.format.name) and any(
                not int(stream.disposition) & av.stream.Disposition.attached_pic
                for stream in video.streams.video
            )
    except (av.FFmpegError, ValueError, OSError):
        return False


def import_av(path: str) -> Any:
    """
    What reads videos, such as that of `path`. Raises ImportError: it is missing; names the video.
    """
    with needs(path, "video"):
        import av
    return av


class Frame(NamedTuple):
    """An image, or a page or frame of a file of several."""

    name: str  # the source's; "video.mp4/000120.jpg" for its frame number 120
    image: Any  # RGB; or an InputError, why there is none
    as_stored: bool = False  # not turned as EXIF says, since its annotations are not either


def read_frames(
    source: Source,
    every: int = 1,
    sizes: Mapping[str, tuple[int, int] | None] | None = None,
    gt: StrPath = "",
) -> Iterator[Frame]:
    """
    Args:
        source: an image or a video.
        every: take one of so many frames of a video or an animation.
        sizes: height and width of annotated images, by name.
        gt: where these come from; named in errors.

    Yields:
        its image, pages or frames, upright; those of `sizes` in the frame of their annotations, see
        :meth:`oln_d2.data.images.Page.of_size`.
    """
    sizes = sizes or {}
    if not source.is_video:
        try:
            for page in read_pages(source.path, every):
                yield _frame(source, page, sizes, gt)
        except InputError as error:
            yield Frame(source.name, error)
        return
    try:
        av = import_av(source.path)
    except ImportError as error:
        yield Frame(source.name, InputError(str(error)))
        return
    try:
        with av.open(source.path) as video:
            if not video.streams.video:
                raise ValueError("it has sound only")
            stream = video.streams.video[0]
            stream.thread_type = "AUTO"
            check_pixels(stream.width, stream.height)
            number = -1
            for number, frame in enumerate(video.decode(stream)):
                if number % every == 0:
                    check_pixels(frame.width, frame.height)
                    image = frame.to_image()
                    if frame.rotation:  # counterclockwise, as Pillow's
                        image = image.rotate(frame.rotation, expand=True)
                    yield _frame(source, Page(number, image, None), sizes, gt)
            if number + 1 < 0.9 * stream.frames:  # a header may be a little wrong, or say 0
                raise ValueError(f"it ends after {number + 1} of {stream.frames} frames")
    except InputError as error:
        yield Frame(source.name, InputError(f"{source.path}: {error}"))
    except (av.FFmpegError, ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        reason = f"{source.path}: cannot be read as a video ({reason}); fetch it again"
        yield Frame(source.name, InputError(reason))


def _frame(source: Source, page: Page, sizes: Mapping[str, Any], gt: StrPath) -> Frame:
    end = "" if page.number is None else f"/{page.number:06d}.jpg"
    name = source.name + end
    try:
        return Frame(name, *page.of_size(sizes.get(name), source.path + end, gt))
    except InputError as error:
        return Frame(name, error)
