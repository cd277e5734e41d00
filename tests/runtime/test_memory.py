"""Limits of the host's memory: control groups of both versions, as the kernel writes them."""

import pytest

from jvdiff.errors import ResourceError
from jvdiff.runtime import memory

GIB = 2**30
# the process's groups -> limits by file; what is least
GROUPS = {
    "version 2, in a container": ("0::/", {"memory.max": GIB}, GIB),
    "version 2, the limit of a group above": (
        "0::/job.slice/step_0/task",
        {"job.slice/step_0/task/memory.max": "max", "job.slice/memory.max": GIB // 2},
        GIB // 2,
    ),
    "version 1": (
        "9:cpu,cpuacct:/a\n8:memory:/docker/abc",
        {"memory/docker/abc/memory.limit_in_bytes": GIB, "memory/memory.limit_in_bytes": 9223372036854771712},
        GIB,
    ),
    "version 1, in a container": ("8:memory:/docker/abc", {"memory/memory.limit_in_bytes": GIB // 4}, GIB // 4),
    "none": ("0::/user.slice", {"user.slice/memory.max": "max"}, None),
    "another system": (None, {}, None),
}


@pytest.mark.parametrize("case", GROUPS)
def test_the_least_limit_counts(case, tmp_path, monkeypatch):
    groups, limits, least = GROUPS[case]
    machine = memory.host()[0]
    for name, limit in limits.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{limit}\n")
    if groups is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(f"{groups}\n")
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    if least is None:
        assert memory.host()[0] >= machine and memory.host()[1] == "this machine has"
        return
    assert memory.host()[0] == least and "memory." in memory.host()[1]
    with pytest.raises(
        ResourceError, match=r"a model needs 80\.0 GiB of the host's memory; .*memory\..* allows .* GiB"
    ):
        memory.check_host(80 * GIB, "a model", "Use less.")
    memory.check_host(least, "a model", "Use less.")
