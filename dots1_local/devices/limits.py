"""What this process may use of the machine: RAM and cores within control groups' limits, a disk.

A container's limits hold for every group above the process too. Page cache counts as available,
because the kernel gives it up when RAM is short: a mapped model fills it, and lives in it.
"""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

__all__ = ["RAM", "allowed_cpus", "available_ram", "cpu_quota", "physical_cores", "read_rate"]

_ROOT = Path("/")
_CPUS = Path("/sys/devices/system/cpu")
_FILE, _CHUNK = 1 << 28, 1 << 22  # bytes
_UNLIMITED = 1 << 60  # cgroup v1 says "no limit" by a number close to 2^63


@dataclass(frozen=True)
class RAM:
    """Bytes that this process can still take, and bytes that it could take if it ran alone."""

    available: int
    total: int


# Where each version of control groups keeps figures: its mount point, the controller, the files of
# the limit and of the usage, and the fields of memory.stat that are page cache.
_MEMORY = (
    ("sys/fs/cgroup", "", "memory.max", "memory.current", ("active_file", "inactive_file")),
    (
        "sys/fs/cgroup/memory",
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
)


def available_ram(root: Path = _ROOT) -> RAM | None:
    """The RAM of a Linux machine, None on other systems; `root` holds its /proc and /sys."""
    sizes = _fields(root / "proc/meminfo")
    if "MemTotal" not in sizes or "MemAvailable" not in sizes:
        return None
    total, available = (1024 * sizes[key] for key in ("MemTotal", "MemAvailable"))
    for mount, controller, limit_file, usage_file, cache_fields in _MEMORY:
        for group in _groups(root, mount, controller):
            limit = _number(group / limit_file)
            if limit is None or limit >= _UNLIMITED:
                continue
            stat = _fields(group / "memory.stat")
            cache = sum(stat.get(field, 0) for field in cache_fields)
            used = max((_number(group / usage_file) or 0) - cache, 0)
            total, available = min(total, limit), min(available, max(limit - used, 0))
    return RAM(available, total)


def cpu_quota(root: Path = _ROOT) -> float | None:
    """The CPU seconds a second that control groups allow; None without a limit."""
    groups = _groups(root, "sys/fs/cgroup", "")
    quotas = [_ratio(_words(group / "cpu.max")) for group in groups]
    for controller in ("cpu", "cpu,cpuacct"):
        for group in _groups(root, f"sys/fs/cgroup/{controller}", controller):
            files = (group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us")
            quotas.append(_ratio([word for file in files for word in _words(file)]))
    return min((quota for quota in quotas if quota is not None), default=None)


def allowed_cpus() -> set[int]:
    """The logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """The cores that this process may use; hyper-threads share what matrix products need."""
    cores = {_siblings(cpu) for cpu in allowed_cpus()}
    quota = cpu_quota()
    return len(cores) if quota is None else max(1, min(len(cores), int(quota)))


def _siblings(cpu: int) -> str:
    try:
        return (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _groups(root: Path, mount: str, controller: str) -> Iterator[Path]:
    """The process's group of a controller and the groups above it, up to the mount point.

    In a container the path may be the host's, and then only the mount point exists.
    """
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == controller or (controller and controller in controllers.split(",")):
            group = root / mount / path.strip("/")
            while group != root / mount:
                if group.is_dir():
                    yield group
                group = group.parent
            yield group


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _number(path: Path) -> int | None:
    words = _words(path)
    return int(words[0]) if words and words[0].isdigit() else None


def _ratio(words: list[str]) -> float | None:
    """Quota / period; None for "max" and -1, which mean that there is no quota."""
    if len(words) != 2 or not all(word.isdigit() for word in words) or words[1] == "0":
        return None
    return int(words[0]) / int(words[1])


def _fields(path: Path) -> dict[str, int]:
    """The numbers in lines such as "MemTotal: 123 kB" and "inactive_file 123"."""
    words = (line.replace(":", " ").split() for line in _lines(path))
    return {each[0]: int(each[1]) for each in words if len(each) > 1 and each[1].isdigit()}


def read_rate(folder: Path) -> float | None:
    """The bytes a second at which a new file in `folder` is read once it has left the page cache.

    None if that cannot be measured: on systems other than Linux, on file systems in RAM, and on
    full or read-only disks.
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            return _measured(file.fileno())
    except OSError:
        return None


def _measured(descriptor: int) -> float | None:
    chunk = bytearray(os.urandom(_CHUNK))  # some file systems compress
    for _ in range(_FILE // _CHUNK):
        os.write(descriptor, chunk)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    if _is_cached(descriptor):
        return None
    os.lseek(descriptor, 0, os.SEEK_SET)
    start = perf_counter()
    while os.readv(descriptor, [chunk]):
        pass
    return _FILE / (perf_counter() - start)


def _is_cached(descriptor: int) -> bool:
    """Whether the middle of the file is in RAM; true if the file system does not tell."""
    try:
        os.preadv(descriptor, [bytearray(1)], _FILE // 2, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    return True
