"""Tasks on threads, of which only so many are begun that their inputs fit in memory.

The threads are daemons: Ctrl-C, or an error in a task, waits for no other task.
"""

from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from queue import SimpleQueue
from typing import Generic, Self, TypeVar

__all__ = ["BoundedPool"]

T = TypeVar("T")


class BoundedPool(Generic[T]):
    """Runs at most `threads` tasks at a time, in a `with` statement.

    `accept` is called with the result of each task, in the thread that calls the methods.
    """

    def __init__(self, threads: int, accept: Callable[[T], None]) -> None:
        self._threads, self._accept = threads, accept
        self._running = 0
        self._ended: SimpleQueue[T | BaseException] = SimpleQueue()

    def __enter__(self) -> Self:
        self._pool = ThreadPool(self._threads)
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.terminate()

    def submit(self, task: Callable[[], T]) -> None:
        """Start a task; wait for another one before if all threads are busy.

        Raises:
            Exception: what an earlier task raised.
        """
        while self._running == self._threads:
            self._take()
        self._running += 1
        self._pool.apply_async(task, callback=self._ended.put, error_callback=self._ended.put)

    def drain(self) -> None:
        """Wait for all tasks that were started.

        Raises:
            Exception: what a task raised.
        """
        while self._running:
            self._take()

    def _take(self) -> None:
        result = self._ended.get()
        self._running -= 1
        if isinstance(result, BaseException):
            raise result
        self._accept(result)
