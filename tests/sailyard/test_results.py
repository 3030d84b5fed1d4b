"""The README's results come from the report, between their markers and nowhere else."""

from __future__ import annotations

import pytest

from sailyard.results import BEGIN, END, NoMarkers, replace_results


def test_only_what_stands_between_the_markers_changes() -> None:
    text = f"# Title\n\n{BEGIN}\nold figures\n{END}\n\nThe rest.\n"
    assert replace_results(text, "new") == f"# Title\n\n{BEGIN}\nnew\n{END}\n\nThe rest.\n"


@pytest.mark.parametrize("text", ["no markers", END + BEGIN, BEGIN])
def test_a_document_without_markers_is_left_alone_and_told(text: str) -> None:
    with pytest.raises(NoMarkers, match="results:begin"):
        replace_results(text, "new")
