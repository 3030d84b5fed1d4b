"""The board: one page per question that people ask about a run.

Start it with ``python -m dashboard``. ``?run=ID&stage=NAME`` opens a stage of a run.
"""

from __future__ import annotations

import streamlit as st

from dashboard import look
from dashboard.views import evaluation, funnel, lineage, metrics, registry, runs
from sailyard.lineage import DatabaseError
from sailyard.settings import get_settings


def main() -> None:
    """Draw the chosen page."""
    st.set_page_config(page_title="Sailyard", page_icon="⛵", layout="wide")
    pages = {
        "Build": [
            st.Page(runs.page, title="Runs", icon=":material/sailing:", default=True),
            st.Page(
                metrics.page, title="Metrics", icon=":material/show_chart:", url_path="metrics"
            ),
            st.Page(funnel.page, title="Data", icon=":material/filter_alt:", url_path="data"),
        ],
        "Release": [
            st.Page(
                evaluation.page,
                title="Evaluation",
                icon=":material/fact_check:",
                url_path="evaluation",
            ),
            st.Page(
                lineage.page, title="Lineage", icon=":material/account_tree:", url_path="lineage"
            ),
            st.Page(registry.page, title="Registry", icon=":material/anchor:", url_path="registry"),
        ],
    }
    with st.sidebar:
        st.markdown("## ⛵ Sailyard")
    current = st.navigation(pages)
    try:
        current.run()
    except DatabaseError as error:
        look.page_header("The board has no database", str(error))
    with st.sidebar:
        st.caption(f"State: `{get_settings().home}`")


main()
