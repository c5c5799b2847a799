"""What this machine has to run a model on."""

import os
from pathlib import Path

__all__ = ["physical_cores"]

_CPUS = Path("/sys/devices/system/cpu")


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once: they share what matrices need."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    siblings = {_siblings(cpu) for cpu in allowed}
    return len(siblings)


def _siblings(cpu: int) -> str:
    try:
        return (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text()
    except OSError:
        return str(cpu)
