"""Requests made several at once, by threads that nobody has to wait for.

Python waits for a pool's threads when it exits, so Ctrl-C would hang on a dead connection.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from threading import Event, Thread
from time import monotonic
from typing import TypeVar

__all__ = ["together"]

_PATIENCE = 1.0  # seconds for threads to notice that they are stopped
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def together(
    work: Callable[[_Item, Event], _Result],
    items: Sequence[_Item],
    count: int,
    meanwhile: Callable[[], None] = lambda: None,
) -> list[_Result]:
    """The results of `work` for every item, `count` at once; `meanwhile` is called now and then.

    When one call raises, or the caller is interrupted, the event that the others hold is set.
    """
    futures: list[Future[_Result]] = [Future() for _ in items]
    waiting = deque(zip(futures, items, strict=True))
    stop = Event()

    def run() -> None:
        while not stop.is_set():
            try:
                future, item = waiting.popleft()
            except IndexError:
                return
            try:
                future.set_result(work(item, stop))
            except BaseException as error:
                future.set_exception(error)

    threads = [Thread(target=run, name="fetch", daemon=True) for _ in items[:count]]
    for thread in threads:
        thread.start()
    try:
        left = set(futures)
        while left:
            done, left = wait(left, timeout=0.2, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            meanwhile()
    finally:
        stop.set()
        deadline = monotonic() + _PATIENCE
        for thread in threads:
            thread.join(max(deadline - monotonic(), 0))
    return [future.result() for future in futures]
