"""``python -m serving``: serve the promoted version, or one checkpoint directory."""

from __future__ import annotations

import argparse
import logging
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
import uvicorn

from serving.app import create_app
from serving.load import load_served, local_checkpoint, promoted
from serving.settings import ServingSettings
from serving.versions import Versions

GRACE_SECONDS = 30  # for replies that are under way when the server is told to stop


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse flags, bind the port, say the address, serve until SIGTERM or SIGINT."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    settings = ServingSettings()
    if options.alias:
        settings = settings.model_copy(update={"alias": options.alias})
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if options.checkpoint:
        fixed = local_checkpoint(options.checkpoint)
        versions = Versions(lambda: fixed, lambda wanted: load_served(wanted, settings), "")
    else:
        nothing = (
            f"nothing is promoted to {settings.alias!r} yet; run the pipeline or "
            "`sailyard promote VERSION`"
        )
        look_up = promoted(settings.alias)
        versions = Versions(look_up, lambda wanted: load_served(wanted, settings), nothing)
    with socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host, options.port))
        host = f"[{options.host}]" if ":" in options.host else options.host
        print(f"serving on http://{host}:{listener.getsockname()[1]}", flush=True)
        config = uvicorn.Config(
            create_app(settings, versions),
            log_config=None,
            # A forwarded address must not pass for loopback in front of /admin.
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        server = uvicorn.Server(config)
        if options.until_stdin_closes:
            threading.Thread(target=_stop_with_parent, args=(server,), daemon=True).start()
        server.run(sockets=[listener])


def _stop_with_parent(server: uvicorn.Server) -> None:
    sys.stdin.buffer.read()
    server.should_exit = True


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--alias", help="registry alias to serve (default: production)")
    parser.add_argument("--checkpoint", type=Path, help="serve this directory, no registry")
    parser.add_argument(
        "--until-stdin-closes",
        action="store_true",
        help="stop when the process that holds the other end of stdin is gone, however it went",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
