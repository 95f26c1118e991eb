"""Work that goes on in a thread while its results are used."""

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def ahead(items: Generator[T, None, None], limit: int) -> Iterator[Iterator[T]]:
    """
    Runs a generator in a thread of its own, which ends with the `with` block.

    Args:
        items: made in the thread, in order.
        limit: at most so many of them wait to be used.

    Yields:
        an iterator over `items`; an error of theirs is raised where the item would have come.
    """
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()  # an item, or the error in place of one
    free = threading.Semaphore(limit)
    stopped = threading.Event()

    def work() -> None:
        try:
            while free.acquire() and not stopped.is_set():
                done.put((next(items), None))
        except BaseException as error:  # StopIteration too
            done.put((None, error))

    def use() -> Iterator[T]:
        while True:
            item, error = done.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            free.release()
            yield item

    thread = threading.Thread(target=work, name="ahead")
    thread.start()
    try:
        yield use()
    finally:
        stopped.set()
        free.release()
        thread.join()
        items.close()
