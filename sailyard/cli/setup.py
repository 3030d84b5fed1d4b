"""``sailyard setup``: the bucket and the lineage schema, before anything else needs them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from sailyard.cli.output import console

if TYPE_CHECKING:
    from sailyard.yard import Yard

_PAUSE_SECONDS = 2.0


def setup(
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for a server that is not up yet.")
    ] = 0.0,
) -> None:
    """Create the store's bucket if it is missing, and bring the database's schema up to date."""
    from sailyard.yard import Yard

    yard = Yard()
    _until(yard, lambda: _bucket(yard), wait)
    _until(yard, lambda: yard.registry.aliases(), wait)
    console.print("store and database are ready", highlight=False)


def _bucket(yard: Yard) -> None:
    from sailyard.artifacts.s3 import S3Store

    if isinstance(yard.store, S3Store):
        yard.store.create_bucket()


def _until(yard: Yard, attempt: Callable[[], object], wait: float) -> None:
    """Try again while a server is away, for ``wait`` seconds after it was first found so.

    Until then nobody has waited for it: clients load and time out, which may take as long. The
    last error is what is told.
    """
    from sailyard.artifacts.objects import StoreError
    from sailyard.lineage.database import DatabaseError

    deadline: float | None = None
    while True:
        try:
            attempt()
            return
        except (StoreError, DatabaseError) as error:
            now = time.monotonic()
            deadline = now + wait if deadline is None else deadline
            if now >= deadline:
                raise
            text = yard.redact(f"waiting: {error}")
            console.print(text, markup=False, highlight=False, soft_wrap=True)
            time.sleep(_PAUSE_SECONDS)
