"""How much of the host's memory this process may have: the machine's, or less where its control group has a limit."""

from __future__ import annotations

import os
from pathlib import Path

from jvdiff.errors import ResourceError

ROOT = Path("/")  # where proc/ and sys/ lie; tests put another in its place


def host() -> tuple[int, str]:
    """(bytes, who says so): the least of the machine's memory and the limits of this process's control groups.

    A limit of a group holds for those in it, so all groups above count; both versions of control groups are read.
    """
    least = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine has"
    for path in _limits():
        text = path.read_text(encoding="ascii", errors="replace").strip() if path.is_file() else "max"
        if text.isdecimal() and int(text) < least[0]:  # "max", or in version 1 a huge number: none
            least = int(text), f"{path} allows"
    return least


def _limits() -> list[Path]:
    """The files that may hold a limit: of this process's group and those above, as far as they are seen from here."""
    groups = ROOT / "proc/self/cgroup"
    lines = groups.read_text(encoding="utf-8", errors="replace").splitlines() if groups.is_file() else []
    found = []
    for _, kinds, name in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if kinds == "":
            base, file = ROOT / "sys/fs/cgroup", "memory.max"
        elif "memory" in kinds.split(","):
            base, file = ROOT / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        inner = [part for part in name.split("/") if part not in ("", "..")]
        found += [base.joinpath(*inner[:count], file) for count in range(len(inner), -1, -1)]
    return found


def check_host(size: int, what: str, advice: str) -> None:
    """Raises ResourceError where `size` bytes are more than the host has for this process.

    what, advice: what needs them, and what to do, as sentences begin and are.
    """
    limit, said = host()
    if size > limit:
        raise ResourceError(
            f"{what} needs {size / 2**30:.1f} GiB of the host's memory; {said} {limit / 2**30:.1f} GiB.\n{advice}"
        )
