"""Threads of a session: the cores of the process' affinity, within the quota of its cgroups."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_deploy.run import OnnxSession
from lora_deploy.run.threads import cpu_quota, usable_threads

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no affinity to ask for")

SECOND = "0::{path}\n", "31 23 0:28 {inside} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
FIRST = (
    "9:name=systemd:/\n4:cpu,cpuacct:{path}\n",
    "20 1 0:3 / /proc rw - proc proc rw\n"
    "31 23 0:28 {inside} /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "32 23 0:29 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n",
)
Machine = Callable[..., Path]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """`machine(cpus, allowed, hyperthreads)`: the root of files of the kernel's, without any cgroup."""

    def make(cpus: int = 8, allowed: int | None = None, hyperthreads: bool = False) -> Path:
        monkeypatch.setattr(os, "cpu_count", lambda: cpus)
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cpus if allowed is None else allowed)))
        for cpu in range(cpus):
            first = cpu - cpu % 2
            text = f"{first}-{first + 1}\n" if hyperthreads else f"{cpu}\n"
            write(tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", text)
        return tmp_path

    return make


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def in_cgroup(root: Path, version: tuple[str, str], path: str = "/", inside: str = "/", **limits: str) -> None:
    """Put the process into a cgroup; limits by the directory below the mount point, "_" for "/"."""
    write(root / "proc/self/cgroup", version[0].format(path=path))
    write(root / "proc/self/mountinfo", version[1].format(inside=inside))
    top = root / ("sys/fs/cgroup" if version is SECOND else "sys/fs/cgroup/cpu")
    top.mkdir(parents=True, exist_ok=True)
    for place, limit in limits.items():
        directory = top / place.replace("_", "/").strip("/")
        if version is SECOND:
            write(directory / "cpu.max", f"{limit}\n")
        else:
            quota, period = limit.replace("max", "-1").split()
            write(directory / "cpu.cfs_quota_us", quota)
            write(directory / "cpu.cfs_period_us", period)


def test_the_whole_machine_is_left_to_onnxruntime(machine: Machine) -> None:
    assert usable_threads(machine()) == 0
    assert usable_threads(machine(hyperthreads=True)) == 0


@pytest.mark.parametrize(("allowed", "hyperthreads", "expected"), [(3, False, 3), (4, True, 2), (1, True, 1)])
def test_the_cores_of_the_affinity(allowed: int, hyperthreads: bool, expected: int, machine: Machine) -> None:
    assert usable_threads(machine(8, allowed, hyperthreads)) == expected


@pytest.mark.parametrize("version", [SECOND, FIRST], ids=["cgroup2", "cgroup1"])
@pytest.mark.parametrize(
    ("limit", "threads", "quota"),
    [
        ("max 100000", 0, None),
        ("200000 100000", 2, 2.0),
        ("150000 100000", 1, 1.5),
        ("20000 100000", 1, 0.2),
        ("25000 10000", 2, 2.5),
        ("800000 100000", 0, 8.0),
        ("1600000 100000", 0, 16.0),
    ],
)
def test_the_quota_of_the_cgroup(
    version: tuple[str, str], limit: str, threads: int, quota: float | None, machine: Machine
) -> None:
    root = machine()
    in_cgroup(root, version, _=limit)
    assert cpu_quota(root) == quota
    assert usable_threads(root) == threads


@pytest.mark.parametrize("version", [SECOND, FIRST], ids=["cgroup2", "cgroup1"])
def test_the_narrowest_of_a_cgroup_and_those_above_it(version: tuple[str, str], machine: Machine) -> None:
    root = machine()
    in_cgroup(root, version, "/a/b/c", a="600000 100000", a_b="300000 100000", a_b_c="500000 100000")
    assert cpu_quota(root) == 3.0
    assert usable_threads(root) == 3
    in_cgroup(root, version, "/a", a="600000 100000")
    assert cpu_quota(root) == 6.0  # what is below it does not count


@pytest.mark.parametrize("version", [SECOND, FIRST], ids=["cgroup2", "cgroup1"])
@pytest.mark.parametrize(("path", "inside"), [("/docker/x", "/docker/x"), ("/docker/x", "/"), ("/../../y", "/")])
def test_a_container_sees_its_own_part_of_the_tree(
    version: tuple[str, str], path: str, inside: str, machine: Machine
) -> None:
    root = machine()
    in_cgroup(root, version, path, inside, _="400000 100000")
    assert cpu_quota(root) == 4.0


def test_affinity_and_quota_together(machine: Machine) -> None:
    root = machine(8, 3)
    in_cgroup(root, SECOND, _="200000 100000")
    assert usable_threads(root) == 2
    in_cgroup(root, SECOND, _="700000 100000")
    assert usable_threads(root) == 3


@pytest.mark.parametrize("limit", ["", "no numbers", "100000", "0 0", "100000 -1"])
def test_what_cannot_be_read_limits_nothing(limit: str, machine: Machine) -> None:
    root = machine()
    in_cgroup(root, SECOND, _=limit)
    assert usable_threads(root) == 0


def test_a_session_has_them(talking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_deploy.run.session.usable_threads", lambda: 1)
    assert OnnxSession(talking).session.get_session_options().intra_op_num_threads == 1
    assert OnnxSession(talking, threads=2).session.get_session_options().intra_op_num_threads == 2
