"""What a program of the campaign may have: memory, the size of files, the rights of a user."""

import os
import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CGROUPS", "NO_LIMITS", "Limits", "addresses"]

CGROUPS = Path("/sys/fs/cgroup/memory")


@dataclass(frozen=True)
class Limits:
    """Limits that a program holds itself to before it begins.

    `file_size` is bytes of a file; `address_space` is bytes of addresses beyond those of a program
    that did nothing yet; `cgroup` is bytes of memory, of which Linux kills what takes more; `user`
    is a user's number.
    """

    file_size: int | None = None
    address_space: int | None = None
    cgroup: int | None = None
    user: int | None = None

    def hold(self) -> None:
        """Hold this process to them."""
        if self.cgroup is not None:
            group = _group(os.getpid())
            group.mkdir()
            (group / "memory.limit_in_bytes").write_text(str(self.cgroup))
            (group / "cgroup.procs").write_text(str(os.getpid()))
        if self.user is not None:
            os.setgroups([])
            os.setgid(self.user)
            os.setuid(self.user)
        if self.file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_size, self.file_size))
        if self.address_space is not None:
            most = self.address_space + addresses()
            resource.setrlimit(resource.RLIMIT_AS, (most, most))

    def clean_up(self, pid: int) -> None:
        """Remove what the limits of an ended process left behind."""
        if self.cgroup is not None:
            with suppress(OSError):
                _group(pid).rmdir()


NO_LIMITS = Limits()


def addresses() -> int:
    """The bytes of this process's addresses."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _group(pid: int) -> Path:
    return CGROUPS / f"dots1-campaign-{pid}"
