"""The board as people see it: a real process, a real headless browser."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from operators.processes import free_ports
from sailyard.yard import Yard
from tests.dashboard.conftest import Seeded
from tests.dashboard.seed import FAILED

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(600)]

PATIENCE = 120_000  # milliseconds; a shared machine can be slow
# Read here: tests run without this process's own SAILYARD_ variables.
SCREENSHOTS = os.environ.get("SAILYARD_SCREENSHOTS")
NAMED_BROWSER = os.environ.get("SAILYARD_TEST_BROWSER")
CANDIDATES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def browser_path() -> str | None:
    """A browser of this machine, or the one named in SAILYARD_TEST_BROWSER."""
    return NAMED_BROWSER or next(filter(None, map(shutil.which, CANDIDATES)), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = browser_path()
    if path is None:
        pytest.skip(f"no browser here: install one of {', '.join(CANDIDATES)}")
    with sync_playwright() as playwright:
        # Containers run as root, where Chromium's own sandbox cannot start.
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def board(own: Seeded, tmp_path: Path) -> Iterator[str]:
    (port,) = free_ports(1)
    with (tmp_path / "board.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dashboard", "--port", str(port)], stdout=log, stderr=log
        )
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 240
        while True:
            try:
                if httpx.get(f"{url}/_stcore/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert process.poll() is None, (tmp_path / "board.log").read_text()
            assert time.monotonic() < until, "the board did not come up"
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=120)


def settle(page: Page, title: str) -> None:
    """Wait until the page with this title is drawn to its end, and has drawn no error."""
    expect(page.get_by_role("heading", name=title, level=1)).to_be_visible()
    app = page.get_by_test_id("stApp")
    expect(app).to_have_attribute("data-test-script-state", "notRunning")
    expect(page.get_by_test_id("stSkeleton")).to_have_count(0)
    expect(page.get_by_test_id("stException")).to_have_count(0)


def keep(page: Page, name: str) -> None:
    """A picture for the documentation, where SAILYARD_SCREENSHOTS names a folder."""
    if SCREENSHOTS:
        page.wait_for_timeout(1500)
        page.screenshot(path=str(Path(SCREENSHOTS) / f"{name}.png"))


def test_board_in_a_browser(browser: Browser, board: str, own: Seeded) -> None:
    page = browser.new_page(viewport={"width": 1500, "height": 950})
    page.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    outside: list[str] = []
    page.on(
        "request",
        lambda request: (
            outside.append(request.url)
            if request.url.startswith("http") and not request.url.startswith(board)
            else None
        ),
    )

    # The link that Airflow shows leads straight to the failed stage and its log.
    page.goto(f"{board}/?run={own.failed}&stage={FAILED}")
    settle(page, "Runs")
    expect(page.get_by_text("no such luck").first).to_be_visible()
    page.goto(f"{board}/?run={own.finished}")
    settle(page, "Runs")
    expect(page.get_by_text("✓ finished").first).to_be_visible()
    keep(page, "runs")

    for title in ("Metrics", "Data", "Evaluation"):
        page.get_by_test_id("stSidebarNav").get_by_text(title, exact=True).click()
        settle(page, title)
        expect(page.locator(".stVegaLiteChart canvas, .stVegaLiteChart svg").first).to_be_visible()
        keep(page, title.lower())

    page.get_by_test_id("stSidebarNav").get_by_text("Lineage", exact=True).click()
    settle(page, "Lineage")
    flow = page.frame_locator("iframe[title*='streamlit_flow']")
    node = flow.locator(".react-flow__node", has_text="think_fusion_sft").first
    expect(node).to_be_visible()
    keep(page, "lineage")
    # A click on a node opens its metadata beside the graph.
    node.click()
    expect(page.get_by_role("heading", name="post_training.think_fusion_sft")).to_be_visible(
        timeout=PATIENCE
    )

    page.get_by_test_id("stSidebarNav").get_by_text("Registry", exact=True).click()
    settle(page, "Registry")
    keep(page, "registry")
    promote(page)
    assert Yard().registry.aliases()["production"].ref == "tiny:2"
    assert not outside, f"the board asked other hosts: {outside[:3]}"


def promote(page: Page) -> None:
    """Choose tiny:2, give a reason, confirm."""
    page.get_by_role("combobox", name="Version").click()
    page.get_by_role("option", name="tiny:2").click()
    page.get_by_role("textbox", name="Why").first.fill("reads better")
    page.get_by_role("button", name="Promote…").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_text("reads better")).to_be_visible()
    dialog.get_by_role("button", name="Yes").click()
    expect(page.get_by_text("production points at tiny:2 now.")).to_be_visible()
