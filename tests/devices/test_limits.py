"""Folders like /proc and /sys, with figures whose result is plain."""

from pathlib import Path

import pytest

from dots1_local.devices import limits
from dots1_local.devices.limits import RAM, available_ram, cpu_quota, physical_cores, read_rate

KB, GB = 1024, 1 << 30


def tree(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    everything = {
        "proc/meminfo": f"MemTotal: {64 * GB // KB} kB\nMemFree: 1 kB\n"
        f"MemAvailable:   {48 * GB // KB} kB\nHugePages_Total: 0\n",
        "proc/self/cgroup": cgroup,
        **files,
    }
    for name, text in everything.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v2(group: str, **files: str) -> dict[str, str]:
    return {f"sys/fs/cgroup{group}/{name.replace('_', '.')}": text for name, text in files.items()}


def test_without_limits_the_kernels_figures_count(tmp_path: Path) -> None:
    root = tree(tmp_path, "0::/user\n", v2("/user", memory_max="max\n", cpu_max="max 100000"))
    assert available_ram(root) == RAM(48 * GB, 64 * GB)
    assert cpu_quota(root) is None


def test_a_groups_page_cache_is_available(tmp_path: Path) -> None:
    stat = f"anon {4 * GB}\nfile {11 * GB}\nactive_file {6 * GB}\ninactive_file {3 * GB}\n"
    files = v2("/box", memory_max=str(20 * GB), memory_current=str(15 * GB), memory_stat=stat)
    root = tree(tmp_path, "0::/box/inner\n", {**files, **v2("/box/inner", memory_max="max")})
    # 15 are used, of which 9 could be given up; the shared memory in "file" could not.
    assert available_ram(root) == RAM(14 * GB, 20 * GB)


def test_the_tightest_group_counts(tmp_path: Path) -> None:
    groups = {
        **v2("/a", memory_max=str(8 * GB), memory_current=str(7 * GB), cpu_max="800000 100000"),
        **v2("/a/b", memory_max=str(6 * GB), memory_current=str(GB), cpu_max="250000 100000"),
    }
    root = tree(tmp_path, "0::/a/b\n", groups)
    assert available_ram(root) == RAM(GB, 6 * GB)
    assert cpu_quota(root) == 2.5


def test_a_container_sees_its_own_group_as_the_mount(tmp_path: Path) -> None:
    files = v2("", memory_max=str(4 * GB), memory_current=str(GB), cpu_max="50000 100000")
    root = tree(tmp_path, "0::/docker/0123\n", files)
    assert available_ram(root) == RAM(3 * GB, 4 * GB)
    assert cpu_quota(root) == 0.5


def test_reads_control_groups_version_1(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(10 * GB),
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": str(9 * GB),
        "sys/fs/cgroup/memory/job/memory.stat": f"inactive_file 1\ntotal_inactive_file {2 * GB}\n"
        f"total_active_file {GB}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "300000",
        "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
    }
    root = tree(tmp_path, "5:memory:/job\n3:cpu,cpuacct:/job\n0::/\n", files)
    assert available_ram(root) == RAM(4 * GB, 10 * GB)
    assert cpu_quota(root) == 3


def test_version_1_without_a_quota_has_none(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
    }
    assert cpu_quota(tree(tmp_path, "2:cpu:/job\n", files)) is None


@pytest.mark.parametrize("damage", ["", "MemTotal 5\n", "MemTotal: many kB\n", "\0\0\n"])
def test_damaged_files_give_no_figures(tmp_path: Path, damage: str) -> None:
    root = tree(tmp_path, "0:\n:::\n\nx", v2("", memory_max="lots", cpu_max="1 0"))
    (root / "proc/meminfo").write_text(damage)
    assert available_ram(root) is None
    assert cpu_quota(root) is None


def test_a_group_that_uses_more_than_its_limit_has_nothing_left(tmp_path: Path) -> None:
    files = v2("", memory_max=str(GB), memory_current=str(2 * GB))
    assert available_ram(tree(tmp_path, "0::/\n", files)) == RAM(0, GB)


def test_counts_neither_hyper_threads_nor_cores_beyond_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cpu in range(8):  # 4 cores of two threads, as the kernel numbers them
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(limits, "_CPUS", tmp_path)
    monkeypatch.setattr(limits, "allowed_cpus", lambda: set(range(8)))
    found = []
    for quota in (None, 64.0, 2.5, 0.5):
        monkeypatch.setattr(limits, "cpu_quota", lambda quota=quota: quota)
        found.append(physical_cores())
    assert found == [4, 4, 2, 1]


def test_reads_a_file_that_is_on_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_FILE", 1 << 22)
    rate = read_rate(tmp_path)  # None where temporary files are in RAM
    assert rate is None or rate > 0
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_in_ram_has_no_read_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_FILE", 1 << 22)
    if not Path("/dev/shm").is_dir():
        pytest.skip("no file system in RAM is at the usual place")
    assert read_rate(Path("/dev/shm")) is None


def test_a_folder_that_cannot_be_written_has_no_read_rate(tmp_path: Path) -> None:
    assert read_rate(tmp_path / "missing") is None
