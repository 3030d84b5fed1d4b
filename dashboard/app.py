"""The board: one page per question that people ask about a run.

Start it with ``python -m dashboard``. ``?run=ID&stage=NAME`` opens a stage of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import streamlit as st

from dashboard import look
from dashboard.selection import run_picker
from dashboard.views import evaluation, funnel, lineage, metrics, registry, runs
from sailyard.lineage import DatabaseError, RunInfo
from sailyard.settings import get_settings

# Files of ours: an icon by name would be fetched from another host.
LOGO = Path(__file__).with_name("logo.svg")
ICON = Path(__file__).with_name("icon.svg")
PAGES: dict[str, list[tuple[str, str, Callable[[RunInfo | None], None]]]] = {
    "Build": [
        ("Runs", ":material/sailing:", runs.page),
        ("Metrics", ":material/show_chart:", metrics.page),
        ("Data", ":material/filter_alt:", funnel.page),
    ],
    "Release": [
        ("Evaluation", ":material/fact_check:", evaluation.page),
        ("Lineage", ":material/account_tree:", lineage.page),
        ("Registry", ":material/anchor:", registry.page),
    ],
}


def main() -> None:
    """Draw the side bar and the chosen page."""
    st.set_page_config(page_title="Sailyard", page_icon=str(ICON), layout="wide")
    st.logo(str(LOGO), size="large")
    run: RunInfo | None = None

    def script(page: Callable[[RunInfo | None], None]) -> Callable[[], None]:
        return lambda: page(run)  # looked up when the page is drawn, after the run is picked

    chosen = st.navigation(
        {
            section: [
                st.Page(script(page), title=title, icon=icon, url_path=title.lower())
                for title, icon, page in pages
            ]
            for section, pages in PAGES.items()
        }
    )
    try:
        run = run_picker()
        chosen.run()
    except DatabaseError as error:
        look.page_header("The board has no database", str(error))
    with st.sidebar:
        st.caption(f"State: {get_settings().home}")


main()
