"""Every page runs on a real lineage database, full and empty, and does what its buttons say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from dashboard.funnels import Funnel, funnels
from dashboard.views import lineage, metrics
from sailyard.lineage import Ancestry, AncestryEdge, ArtifactNode
from sailyard.yard import Yard
from tests.dashboard.conftest import Seeded
from tests.dashboard.seed import FAILED

APP = Path(__file__).parents[2] / "dashboard" / "app.py"
PAGES = ("runs", "metrics", "funnel", "evaluation", "lineage", "registry")


def open_page(name: str, **link: str) -> AppTest:
    test = AppTest.from_string(
        "from dashboard.selection import run_picker\n"
        f"from dashboard.views import {name}\n{name}.page(run_picker())",
        default_timeout=240,
    )
    test.query_params.update(link)
    test.run()
    assert not test.exception, test.exception
    return test


def text_of(test: AppTest) -> str:
    parts = [
        element.value
        for kind in (
            "title",
            "markdown",
            "caption",
            "subheader",
            "info",
            "error",
            "success",
            "code",
        )
        for element in getattr(test, kind)
    ]
    parts += [f"{metric.label} {metric.value}" for metric in test.metric]
    return "\n".join(str(part) for part in parts)


@pytest.mark.parametrize("name", PAGES)
def test_empty_database_says_what_to_do(name: str) -> None:
    text = text_of(open_page(name))
    assert "`make demo`" in text or "deployment.register" in text


@pytest.mark.parametrize("name", PAGES)
def test_page_of_a_finished_run(name: str, seeded: Seeded) -> None:
    test = open_page(name, run=seeded.finished)
    assert not test.error
    assert test.sidebar.selectbox[0].value == seeded.finished


@pytest.mark.parametrize("name", PAGES)
def test_page_of_a_failed_run(name: str, seeded: Seeded) -> None:
    test = open_page(name, run=seeded.failed)
    assert test.sidebar.selectbox[0].value == seeded.failed


def test_board_opens_on_the_newest_run(seeded: Seeded) -> None:
    test = AppTest.from_file(str(APP), default_timeout=240).run()
    assert not test.exception
    assert test.title[0].value == "Runs"
    assert test.sidebar.selectbox[0].value == seeded.failed


def test_runs_show_status_failure_and_log(seeded: Seeded) -> None:
    test = open_page("runs", run=seeded.failed)
    text = text_of(test)
    assert "Status :red[✗ failed]" in text
    # The failed stage is what one wants to see first.
    assert test.selectbox(key="stage picker").value == FAILED
    assert test.error[0].value == "ValueError: no such luck"
    assert "step 2\nValueError: no such luck" in text


def test_link_opens_a_stage(seeded: Seeded) -> None:
    test = open_page("runs", run=seeded.finished, stage="curation.caption2")
    assert test.selectbox(key="stage picker").value == "curation.caption2"
    assert "curation.caption2 began\nall done" in text_of(test)
    reused = open_page("runs", run=seeded.failed, stage="curation.caption2")
    assert f"computed in run `{seeded.finished}`" in text_of(reused)
    assert "curation.caption2 began\nall done" in text_of(reused)


def test_unknown_links_are_not_fatal(seeded: Seeded) -> None:
    test = open_page("runs", run="no-such-run", stage="no.such.stage")
    assert "no-such-run" in test.warning[0].value
    assert test.sidebar.selectbox[0].value == seeded.failed
    test = open_page("lineage", run=seeded.finished, artifact="feedfeed")
    assert "no artifact starts with" in test.warning[0].value


def test_metrics_compare_runs(seeded: Seeded) -> None:
    test = open_page("metrics", run=seeded.failed)
    test.selectbox(key="metrics stage").set_value("bootstrap.vision").run()
    test.multiselect(key="metrics runs").set_value([seeded.finished]).run()
    test.slider(key="metrics smoothing").set_value(0.5).run()
    assert not test.exception
    shown = test.multiselect(key="metrics series bootstrap.vision").value
    assert shown == ["loss", "lr", "grad_norm"]
    assert len(test.get("vega_lite_chart")) == 3


def test_evaluation_stands_beside_the_paper(seeded: Seeded) -> None:
    test = open_page("evaluation", run=seeded.finished)
    tables = "\n".join(frame.value.to_string() for frame in test.dataframe)
    assert "paper, SAIL-VL2-2B" in tables
    assert "2.00 → 1.50 (-25%)" in tables
    assert "1.42 → 1.15 (-19%)" in tables
    assert "Final (mixed rl) 0.700" in text_of(test)
    missing = open_page("evaluation", run=seeded.failed)
    assert "no evaluation yet" in text_of(missing)


def test_lineage_follows_a_link_across_runs(seeded: Seeded) -> None:
    yard = Yard()
    version = yard.registry.version("tiny:1")
    test = open_page("lineage", run=seeded.failed, artifact=version.checkpoint[:16])
    assert test.selectbox(key="artifact picker").value == version.checkpoint
    text = text_of(test)
    assert version.checkpoint in text
    assert f"?run={seeded.finished}&stage=post_training.mixed_rl" in text


def test_lineage_opens_at_a_stage(seeded: Seeded) -> None:
    """The link that Airflow shows on a task."""
    test = open_page("lineage", run=seeded.finished, stage="post_training.soup")
    assert test.subheader[0].value == "post_training.soup"
    test = open_page("lineage", run=seeded.failed, stage=FAILED)
    assert f"{FAILED} has made nothing in this run yet" in test.info[0].value


def test_data_page_shows_reasons_and_both_sides(seeded: Seeded) -> None:
    text = text_of(open_page("funnel", run=seeded.finished))
    assert "90 captions came, 70 stayed (77.8%)" in text
    assert "Dropped" in text
    assert ":red-badge[ita\\_score below 3]" in text
    assert "Describe \\*this\\* \\[picture\\]." in text


def test_promote_and_roll_back(own: Seeded) -> None:
    registry = Yard().registry
    test = open_page("registry")
    assert "production tiny:1" in text_of(test)

    def send(form: str) -> None:
        next(b for b in test.button if b.form_id == form).click().run()
        assert not test.exception

    test.selectbox(key="promote version").set_value("tiny:2")
    send("promote")
    assert "Say why" in test.error[0].value
    assert registry.aliases()["production"].ref == "tiny:1"

    test.text_input(key="promote reason").set_value("better at reading")
    send("promote")
    test.button(key="move no").click().run()
    assert not [button for button in test.button if button.key == "move yes"]
    send("promote")
    # Nothing moves before the second click.
    assert registry.aliases()["production"].ref == "tiny:1"
    test.button(key="move yes").click().run()
    assert registry.aliases()["production"].ref == "tiny:2"
    assert registry.promotions()[0].reason == "better at reading"

    test.text_input(key="rollback reason").set_value("it was not")
    send("rollback")
    test.button(key="move yes").click().run()
    assert registry.aliases()["production"].ref == "tiny:1"
    assert registry.promotions()[0].action == "rollback"


def test_a_lost_store_is_said(own: Seeded) -> None:
    for pointer in (own.home / "store").rglob("pointer.json"):
        pointer.unlink()
    for name in ("evaluation", "lineage", "funnel"):
        test = open_page(name, run=own.finished)
        messages = [element.value for element in (*test.error, *test.warning)]
        assert any("no artifact" in message for message in messages), name


def test_a_database_that_cannot_be_opened_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAILYARD_DATABASE_URL", f"sqlite:///{tmp_path}/folder.db")
    (tmp_path / "folder.db").mkdir()
    test = AppTest.from_file(str(APP), default_timeout=240).run()
    assert not test.exception
    assert "cannot open the lineage database" in text_of(test)


def test_board_imports_without_torch() -> None:
    code = (
        "import sys, runpy\n"
        "import dashboard.views.evaluation, dashboard.views.funnel, dashboard.views.lineage\n"
        "import dashboard.views.metrics, dashboard.views.registry, dashboard.views.runs\n"
        "import dashboard.__main__, streamlit_flow\n"
        "sys.exit(bool({'torch', 'transformers', 'airflow', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the parts that need no page ------------------------------------------------------------------


def graph() -> Ancestry:
    nodes = [ArtifactNode(name, "dataset", 1, f"curation.{name}", "run") for name in "abcd"]
    edges = [
        AncestryEdge(source, target, "s", "i", "o")
        for source, target in (("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"), ("a", "d"))
    ]
    return Ancestry("d", tuple(nodes), tuple(edges), truncated=False)


def test_lineage_is_laid_out_by_depth() -> None:
    assert lineage.layers(graph()) == {"a": 0, "b": 1, "c": 1, "d": 2}
    places = lineage.positions(graph())
    assert len(set(places.values())) == 4
    assert places["a"][0] < places["b"][0] == places["c"][0] < places["d"][0]
    assert '"a" -> "b"' in lineage.dot(graph())


def test_lineage_shows_the_nearest_steps() -> None:
    near = lineage.within(graph(), 1)
    assert {node.digest for node in near.nodes} == {"a", "b", "c", "d"}
    chain = graph()
    edges = tuple(edge for edge in chain.edges if (edge.source, edge.target) != ("a", "d"))
    near = lineage.within(Ancestry("d", chain.nodes, edges, truncated=False), 1)
    assert {node.digest for node in near.nodes} == {"b", "c", "d"}
    assert {edge.target for edge in near.edges} == {"d"}


def test_smoothing_starts_at_the_data_and_keeps_gaps() -> None:
    points: list[tuple[int, float | None]] = [(0, 4.0), (1, None), (2, 2.0)]
    assert metrics.smoothed(points, 0.0) == [4.0, None, 2.0]
    first, gap, last = metrics.smoothed(points, 0.5)
    assert (first, gap) == (4.0, None)
    assert last == pytest.approx((0.5 * 2 + 0.25 * 4) / 0.75)


def test_funnels_read_every_stage_in_its_own_words() -> None:
    assert funnels({}) == []
    found = funnels(
        {
            "curation.video": {
                "num_raw": 10,
                "num_kept": 6,
                "funnel": {"kept": 6, "alignment": 3, "difficulty": 1},
            },
            "curation.think_fusion": {"replies": {"accepted": 2, "wrong": 5}},
        }
    )
    assert found == [
        Funnel("curation.video", "clips", 10, 6, {"alignment": 3, "difficulty": 1}),
        Funnel("curation.think_fusion", "thoughts", 7, 2, {"wrong": 5}),
    ]
    assert found[0].dropped == 4
