"""``python -m dashboard``: the board on a port of this machine."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

APP = Path(__file__).with_name("app.py")


def command(host: str, port: int) -> list[str]:
    """The command that runs the board; Streamlit finds the theme beside the script."""
    return [
        sys.executable,
        "-m",
        "streamlit",
        "run",
        str(APP),
        "--server.address",
        host,
        "--server.port",
        str(port),
        "--server.headless",
        "true",
        "--browser.gatherUsageStats",
        "false",
        "--server.fileWatcherType",
        "none",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Become Streamlit, so that whoever started this process stops the board with it."""
    parser = argparse.ArgumentParser(prog="python -m dashboard", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8501)
    options = parser.parse_args(arguments)
    os.execv(sys.executable, command(options.host, options.port))


if __name__ == "__main__":
    main()
