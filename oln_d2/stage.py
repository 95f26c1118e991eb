"""Proposals as a stage of an engine for data on many machines: Ray Data, Spark, Hugging Face."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from oln_d2.checks import InputError
from oln_d2.data.images import decode_image, to_image
from oln_d2.files import StrPath
from oln_d2.loading import load
from oln_d2.propose.proposer import Batches, Proposer, check_selection

NEW = ("boxes", "scores", "error")


class BatchProposer:
    """
    A function of batches of rows that have an image each, which gives them proposals.

        stage = oln_d2.BatchProposer(image="jpg")
        stage({"jpg": [data, other]})  # {"jpg": ..., "boxes": ..., "scores": ..., "error": ...}

    It needs none of these engines, can be sent to other processes, and loads the model in each when
    that gets its first batch.

    Args:
        weights, config_file, device, min_size, tiles: see :func:`oln_d2.load`.
        image: the column of the images.
        top_k, score, nms, batch_size: see :meth:`oln_d2.propose.Proposer.__call__`; rows of any
            sizes may come in any order, for each batch of the engine is split by size.

    Raises:
        InputError: an argument that cannot be used.
    """

    def __init__(
        self,
        weights: StrPath | None = None,
        config_file: StrPath | None = None,
        device: str = "auto",
        *,
        image: str = "image",
        min_size: int | None = None,
        tiles: int | None = None,
        top_k: int = 100,
        score: float = 0.0,
        nms: float | None = None,
        batch_size: int = 4,
    ):
        check_selection(top_k, score, nms, batch_size, every=1)
        self._model: dict[str, Any] = {
            "weights": weights,
            "config_file": config_file,
            "device": device,
        }
        self._model |= {"min_size": min_size, "tiles": tiles}
        self._image, self._batch_size = image, batch_size
        self._selection = top_k, score, nms

    @cached_property
    def _proposer(self) -> Proposer:
        return load(**self._model)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_proposer"}

    def __call__(self, batch: Any) -> Any:
        """
        Args:
            batch: columns by name, arrays or lists, or a pyarrow Table. An image is what an image
                file holds, as bytes or as {"bytes": ...}; or a PIL image or an array (H, W, 3),
                uint8, RGB. Of several pages or frames the first is taken.

        Returns:
            the same kind with three more columns. In each row `boxes` are D lists [x1, y1, x2, y2]
            in pixels of the upright image, best first; `scores` D numbers in [0, 1]; `error` is ""
            or why the image cannot be read, a sentence; it then has no boxes.

        Raises:
            InputError: there is no column of the images, or one of the new names; or as `load`.
        """
        table = hasattr(batch, "column_names")
        names = batch.column_names if table else list(batch)
        if self._image not in names:
            raise InputError(
                f"there is no column {self._image!r}, but {', '.join(map(repr, names))}; say which "
                "has the images, as in image='jpg'"
            )
        if taken := [name for name in NEW if name in names]:
            raise InputError(f"there is a column {taken[0]!r} already; rename it")
        column = batch[self._image]
        rows = self._propose(cell.as_py() for cell in column) if table else self._propose(column)
        new = dict(zip(NEW, zip(*rows, strict=True))) if rows else dict.fromkeys(NEW, ())
        if not table:
            return {**batch, **{name: _objects(values) for name, values in new.items()}}
        import pyarrow as pa

        numbers = pa.list_(pa.float64())  # what has no boxes does not say the type of any
        types = dict(zip(NEW, (pa.list_(numbers), numbers, pa.string())))
        for name, values in new.items():
            batch = batch.append_column(name, pa.array(values, types[name]))
        return batch

    def _propose(self, cells: Iterable[Any]) -> list[tuple[list[list[float]], list[float], str]]:
        """What is new in each row."""
        proposer = self._proposer  # here, where what is wrong with it is not taken for a row's
        rows: list[Any] = []

        def finish(batches):
            for batch in batches:
                photos, numbers = zip(*batch, strict=True)
                found = proposer.propose(list(photos), *self._selection)
                for number, each in zip(numbers, found, strict=True):
                    rows[number] = each.boxes.tolist(), each.scores.tolist(), ""

        batches = Batches(self._batch_size)
        for number, cell in enumerate(cells):
            rows.append(None)
            try:
                photo = proposer.prepare(self._read(cell))
            except InputError as error:
                rows[number] = [], [], str(error)
                continue
            finish(batches.add(photo, number))
        finish(batches.rest())
        return rows

    def _read(self, cell: Any) -> Image.Image:
        name = self._image
        if isinstance(cell, Mapping) and "bytes" in cell:  # as Hugging Face keeps images
            name, cell = cell.get("path") or name, cell["bytes"]
        if cell is None:
            raise InputError(f"{name}: there is no image in this row")
        if isinstance(cell, (bytes, bytearray, memoryview)):
            return decode_image(bytes(cell), name)
        return to_image(cell)


def _objects(values: Sequence[Any]) -> NDArray[np.object_]:
    """An array whose elements are these, lists as they are."""
    ret = np.empty(len(values), object)
    for number, value in enumerate(values):
        ret[number] = value
    return ret
