"""The run that all pages look at: from the link, from the side bar, else the newest."""

from __future__ import annotations

import streamlit as st

from dashboard import data, look
from sailyard.lineage import RunInfo

RUN, STAGE = "run", "stage"
_PICKER = "run picker"


def run_picker() -> RunInfo | None:
    """Draw the side bar's run picker; None when there is no run at all.

    The board draws it outside its pages: a widget inside a page forgets its choice when the page
    is left.
    """
    found = data.runs()
    if not found:
        return None
    by_id = {run.id: run for run in found}
    if st.session_state.get(_PICKER) not in by_id:
        wanted = st.query_params.get(RUN, "")
        if wanted and wanted not in by_id:
            st.warning(f"There is no run {wanted!r} among the newest {len(found)}; see the newest.")
        st.session_state[_PICKER] = wanted if wanted in by_id else found[0].id
    with st.sidebar:
        chosen = st.selectbox(
            "Run",
            list(by_id),
            format_func=lambda run_id: f"{look.status_mark(by_id[run_id].status)} {run_id}",
            help="Newest first. Every page shows this run.",
            key=_PICKER,
        )
    # In the address too, so that it can be passed on; changing pages empties it.
    st.query_params[RUN] = chosen
    return by_id[chosen]
