"""A request that the scheduler has taken: who is told of it, and whether they still listen."""

import logging
from collections.abc import Callable
from threading import RLock

from dots1_local.serve.generation import Event, Failed

__all__ = ["Ticket"]

_log = logging.getLogger(__name__)


class Ticket:
    """What `Scheduler.submit` returns; `over` once nothing more will be delivered."""

    def __init__(self, deliver: Callable[[Event], None]) -> None:
        self._deliver = deliver
        self._delivering = RLock()
        self.over = False

    def cancel(self) -> None:
        """Give the request up, from any thread; nothing is delivered after this returns.

        Its sequences become free before the next ubatch.
        """
        with self._delivering:
            self.over = True

    def tell(self, event: Event) -> None:
        """Deliver an event, if anybody listens; a listener that raises gets no further ones."""
        with self._delivering:
            if self.over:
                return
            self.over = isinstance(event, Failed)
            try:
                self._deliver(event)
            except Exception:
                _log.exception("an event could not be delivered")
                self.over = True
