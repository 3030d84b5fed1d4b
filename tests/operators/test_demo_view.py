"""The demo's table: the rows that matter stay visible, and a pipe gets plain lines."""

from __future__ import annotations

import io

from rich.console import Console

from operators.demo_view import CACHED, DONE, FAILED, RUNNING, WAITING, Row, StageView, window


def rows(*states: str) -> list[Row]:
    return [Row(f"g.s{i}", state, 1.5) for i, state in enumerate(states)]


def test_a_pipe_gets_one_line_for_each_change() -> None:
    out = io.StringIO()
    with StageView(Console(file=out, width=200)) as view:
        view.update(rows(RUNNING, WAITING))
        view.update(rows(RUNNING, WAITING))
        view.update(rows(DONE, "queued"))
        view.update(rows(DONE, CACHED))
    assert out.getvalue().splitlines() == [
        "[ 0/2] g.s0: running",
        "[ 1/2] g.s0: done 1.5 s",
        "[ 2/2] g.s1: cached 1.5 s",
    ]


def test_a_terminal_gets_a_table_with_every_state() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, height=40)
    with StageView(console) as view:
        view.update([Row("alignment.warmup", RUNNING, 3.25, "step 4 of 9"), *rows(DONE, FAILED)])
    for text in ("alignment.warmup", "running", "3.2 s", "step 4 of 9", "1 done, 1 failed"):
        assert text in out.getvalue()


def test_a_long_table_follows_what_is_running() -> None:
    many = rows(*[DONE] * 30, RUNNING, *[WAITING] * 20)
    shown = window(many, 12)
    assert len(shown) == 12
    assert many[30] in shown
    assert many[29] in shown
    assert window(many, 100) == many
    assert window(rows(*[DONE] * 30), 10)[-1].name == "g.s29"
