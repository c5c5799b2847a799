"""A request in the scheduler's hands: who is told, and whether anybody still listens."""

import logging
from collections.abc import Callable
from threading import RLock

from dots1_local.serve.generation import Event, Failed

__all__ = ["Ticket"]

_log = logging.getLogger(__name__)


class Ticket:
    """What `Scheduler.submit` gives; `over` once nothing more will be delivered."""

    def __init__(self, deliver: Callable[[Event], None]) -> None:
        self._deliver = deliver
        self._delivering = RLock()
        self.over = False

    def cancel(self) -> None:
        """Want no more of it, from any thread; when this returns, nothing more is delivered.

        Its sequences are free before the next ubatch.
        """
        with self._delivering:
            self.over = True

    def tell(self, event: Event) -> None:
        """Deliver an event, if anybody listens. A listener that fails is no more told anything."""
        with self._delivering:
            if self.over:
                return
            self.over = isinstance(event, Failed)
            try:
                self._deliver(event)
            except Exception:
                _log.exception("an event could not be delivered")
                self.over = True
