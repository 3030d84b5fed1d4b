"""Page "Registry": model versions, what serves, and moving it, with a reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import streamlit as st

from dashboard import data, look
from sailyard.lineage import RunInfo
from sailyard.registry import ModelVersion, Registry, RegistryError

DEFAULT_ALIAS = "production"
_DONE, _MOVE = "registry done", "registry move"


@dataclass(frozen=True)
class Move:
    """A move that was asked for and waits for its second click."""

    action: str
    alias: str
    ref: str
    reason: str


def page(_run: RunInfo | None) -> None:
    """Draw the page; versions belong to no run, so the picked one does not matter."""
    look.page_header(
        "Registry",
        "Versions that runs registered, the aliases that point at them, and every move ever made.",
    )
    registry = data.yard().registry
    if message := st.session_state.pop(_DONE, None):
        st.success(message)
    versions = registry.versions()
    if not versions:
        look.nothing_yet(
            "No version is registered yet.",
            "A run registers its final checkpoint at `deployment.register`.",
        )
        return
    aliases = registry.aliases()
    _serving(aliases)
    st.subheader("Versions")
    _versions(versions)
    left, right = st.columns(2, gap="medium")
    with left:
        _promote(versions, aliases)
    with right:
        _rollback(aliases)
    if _MOVE in st.session_state:
        _confirm(registry)
    st.subheader("History")
    _history(registry)


def _serving(aliases: dict[str, ModelVersion]) -> None:
    if not aliases:
        st.info("No alias points anywhere yet: nothing is served.", icon=":material/anchor:")
        return
    for column, (alias, version) in zip(
        st.columns(max(3, len(aliases))), aliases.items(), strict=False
    ):
        with column, st.container(border=True):
            st.metric(alias, version.ref)
            st.caption(f"checkpoint `{look.short(version.checkpoint)}` · run `{version.run_id}`")


def _versions(versions: list[ModelVersion]) -> None:
    rows = [_row(version) for version in versions]
    st.dataframe(
        rows,
        hide_index=True,
        column_config={
            "lineage": st.column_config.LinkColumn("lineage", display_text="show"),
            "run": st.column_config.LinkColumn("run", display_text=r"run=([^&]+)"),
        },
    )


def _row(version: ModelVersion) -> dict[str, Any]:
    figures = {
        look.label(name): value
        for name, value in version.metrics.items()
        if isinstance(value, (int, float))
    }
    return {
        "version": version.ref,
        "aliases": ", ".join(version.aliases),
        **dict(list(figures.items())[:6]),
        "registered": look.time_text(version.created_at),
        "run": f"/?run={version.run_id}",
        "lineage": f"/lineage?artifact={version.checkpoint}",
    }


def _promote(versions: list[ModelVersion], aliases: dict[str, ModelVersion]) -> None:
    st.subheader("Promote")
    with st.form("promote", border=True):
        ref = st.selectbox("Version", [version.ref for version in versions], key="promote version")
        alias = st.text_input("Alias", DEFAULT_ALIAS, key="promote alias").strip()
        reason = st.text_input("Why", placeholder="for the record", key="promote reason").strip()
        sent = st.form_submit_button("Promote…", icon=":material/rocket_launch:", type="primary")
    if not sent:
        return
    current = aliases.get(alias)
    if not reason:
        st.error("Say why: the note stays in the history.")
    elif current is not None and current.ref == ref:
        st.info(f"{alias} points at {ref} already.")
    else:
        st.session_state[_MOVE] = Move("promote", alias, ref, reason)


def _forget() -> None:
    st.session_state.pop(_MOVE, None)


@st.dialog("Are you sure?", on_dismiss=_forget)
def _confirm(registry: Registry) -> None:
    move: Move = st.session_state[_MOVE]
    current = registry.current(move.alias)
    if move.action == "promote":
        before = f"instead of **{current.ref}**" if current else "for the first time"
        st.markdown(f"Point **{move.alias}** at **{move.ref}**, {before}.")
        _comparison(registry.version(move.ref), current)
    elif current is not None:
        st.markdown(f"Take **{move.alias}** off **{current.ref}**, back to the version before.")
    st.caption(f"Reason: {move.reason}")
    st.caption("A running endpoint switches within seconds and drops no request.")
    yes, no = st.columns(2)
    if no.button("No", key="move no", width="stretch"):
        _forget()
        st.rerun()
    if yes.button("Yes", type="primary", key="move yes", width="stretch"):
        _forget()
        try:
            st.session_state[_DONE] = _carry_out(registry, move)
        except RegistryError as error:
            st.error(str(error))
        else:
            st.rerun()


def _carry_out(registry: Registry, move: Move) -> str:
    if move.action == "promote":
        there = registry.promote(move.alias, move.ref, reason=move.reason)
    else:
        there = registry.rollback(move.alias, reason=move.reason)
    return f"{move.alias} points at {there.ref} now."


def _comparison(chosen: ModelVersion, current: ModelVersion | None) -> None:
    names = [n for n, value in chosen.metrics.items() if isinstance(value, (int, float))]
    if not names:
        return
    now = current.metrics if current else {}
    st.dataframe(
        [
            {
                "metric": look.label(name),
                "now": look.number(now[name]) if name in now else "–",
                chosen.ref: look.number(chosen.metrics[name]),
            }
            for name in names
        ],
        hide_index=True,
    )


def _rollback(aliases: dict[str, ModelVersion]) -> None:
    st.subheader("Roll back")
    if not aliases:
        st.caption("Nothing was promoted yet.")
        return
    with st.form("rollback", border=True):
        alias = st.selectbox("Alias", list(aliases), key="rollback alias")
        reason = st.text_input("Why", placeholder="for the record", key="rollback reason").strip()
        st.caption("The alias goes back to the version it pointed at before.")
        sent = st.form_submit_button("Roll back…", icon=":material/undo:")
    if not sent:
        return
    if not reason:
        st.error("Say why: the note stays in the history.")
    else:
        st.session_state[_MOVE] = Move("rollback", alias, "", reason)


def _history(registry: Registry) -> None:
    moves = registry.promotions()
    if not moves:
        st.caption("No alias has moved yet.")
        return
    st.dataframe(
        [
            {
                "when": look.time_text(move.at),
                "alias": move.alias,
                "action": move.action,
                "from": move.previous or "–",
                "to": move.version,
                "who": move.actor,
                "why": move.reason,
            }
            for move in moves
        ],
        hide_index=True,
    )
