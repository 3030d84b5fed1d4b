"""Work in forked processes, so that a test can kill, limit or race them."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable


def in_children(count: int, work: Callable[[int], None]) -> list[int]:
    """Run `work(i)` in forked processes at once; their wait statuses."""
    children = []
    for i in range(count):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                work(i)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitpid(child, 0)[1] for child in children]
