"""From what a user names to the images to propose on."""

import glob
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from PIL import Image

from oln_d2.checks import InputError, needs
from oln_d2.data.images import open_image
from oln_d2.files import StrPath

VIDEOS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"}


class Source(NamedTuple):
    """An image file, or a video."""

    path: str  # absolute
    name: str  # relative to the folder that all sources are in; with "/"

    @property
    def is_video(self) -> bool:
        return os.path.splitext(self.path)[1].lower() in VIDEOS


def find_sources(
    patterns: Iterable[str], output: StrPath | None = None
) -> tuple[str, list[Source]]:
    """
    Args:
        patterns: image files, videos, folders (with all below them) and globs.
        output: a folder in which nothing is looked for, as it will hold pictures of proposals.

    Returns:
        the folder that all are in, and each once, in the order of `patterns`, those of a folder or
        a glob by name. In a folder, files count whose ending is that of an image format or a video;
        files named explicitly are always used.

    Raises:
        InputError: a pattern that nothing matches, a folder without images, or a file name that
            cannot be written to other files.
        ImportError: there is a video, and the package that reads it is missing.
    """
    # Photos of phones, too: that Pillow cannot read them without a plug-in is said at the end.
    endings = VIDEOS | {".heic", ".heif"} | set(Image.registered_extensions()) - {".pdf"}
    paths = []
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        if not matches:
            raise InputError(f"{pattern}: no such file or folder, and no file matches it as a glob")
        for match in sorted(matches):
            if not os.path.isdir(match):
                paths.append(match)
                continue
            inside = [
                os.path.join(folder, file)
                for folder, _, files in os.walk(match, followlinks=True)
                for file in files
                if os.path.splitext(file)[1].lower() in endings and not file.startswith(".")
            ]
            if not inside and match == pattern:
                raise InputError(f"{match}: no image or video is in this folder")
            paths += sorted(inside)
    paths = list(dict.fromkeys(map(os.path.abspath, paths)))
    if output is not None:
        own = os.path.join(os.path.abspath(output), "")
        paths = [path for path in paths if not path.startswith(own)]
    if not paths:
        raise InputError(f"{', '.join(patterns)}: there is no image or video outside of {output}")
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError:
            raise InputError(f"{path!a}: has a name that is not UTF-8; rename it") from None
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    sources = [Source(path, os.path.relpath(path, root).replace(os.sep, "/")) for path in paths]
    if any(source.is_video for source in sources):
        _import_av()
    return root, sources


def _import_av():
    with needs("a video", "video"):
        import av
    return av


class Frame(NamedTuple):
    """An image, or a frame of a video."""

    name: str  # of the source; "video.mp4/000120.jpg" for its frame number 120
    image: Image.Image | InputError  # RGB; or why there is none


def read_frames(source: Source, every: int = 1) -> Iterator[Frame]:
    """
    Args:
        source: an image or a video.
        every: of a video, take one of so many frames.

    Yields:
        its image or frames, upright.
    """
    if not source.is_video:
        try:
            yield Frame(source.name, open_image(source.path))
        except InputError as error:
            yield Frame(source.name, error)
        return
    av = _import_av()
    try:
        with av.open(source.path) as video:
            if not video.streams.video:
                raise ValueError("it has sound only")
            stream = video.streams.video[0]
            stream.thread_type = "AUTO"
            number = -1
            for number, frame in enumerate(video.decode(stream)):
                if number % every == 0:
                    image = frame.to_image()
                    if frame.rotation:  # counterclockwise, as Pillow's
                        image = image.rotate(frame.rotation, expand=True)
                    yield Frame(f"{source.name}/{number:06d}.jpg", image)
            if number + 1 < 0.9 * stream.frames:  # a header may be a little wrong, or say 0
                raise ValueError(f"it ends after {number + 1} of {stream.frames} frames")
    except (av.FFmpegError, ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        reason = f"{source.path}: cannot be read as a video ({reason}); fetch it again"
        yield Frame(source.name, InputError(reason))
