"""Small facts about processes that the standard library leaves out."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def die_with_parent(parent: int) -> None:
    """Have this process killed when its parent is; called in the child, first thing."""
    if not _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it went before the kernel was asked
        os._exit(1)


def adopt_orphans() -> None:
    """Have processes that descendants leave behind handed to this one (Linux only)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_children() -> None:
    """Kill and reap every child of this process; adopted orphans come round again."""
    own = os.getpid()
    for _ in range(100):
        children = [pid for pid, parent in _parents().items() if parent == own]
        if not children:
            return
        for pid in children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def descendants(root: int) -> list[int]:
    """Processes below one, as the kernel tells (Linux; elsewhere none)."""
    parents = _parents()
    found = [root]
    for ancestor in found:
        found += [pid for pid, parent in parents.items() if parent == ancestor]
    return found[1:]


def kill_group(leader: int, extra: list[int]) -> None:
    """SIGKILL a process group and further processes, whichever still exist."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
    for pid in extra:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _prctl(option: int, value: int) -> bool:
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _parents() -> dict[int, int]:
    """Process id -> id of its parent."""
    found = {}
    folder = Path("/proc")
    for name in os.listdir(folder) if folder.is_dir() else []:
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError, IndexError, ValueError):
            text = (folder / name / "stat").read_text()
            # The name in parentheses may itself hold spaces and parentheses.
            found[int(name)] = int(text.rpartition(")")[2].split()[1])
    return found
