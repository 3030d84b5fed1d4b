"""``python -m serving``: serve the promoted version, or one checkpoint directory."""

from __future__ import annotations

import argparse
import logging
import socket
from collections.abc import Sequence
from pathlib import Path

from sailyard.processes import die_with_parent
from serving.settings import ServingSettings

GRACE_SECONDS = 30  # for replies that are under way when the server is told to stop


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse flags, bind the port, say the address, serve until SIGTERM or SIGINT."""
    options = _parse(arguments)
    if options.parent:
        die_with_parent(options.parent)
    # Torch takes seconds to import: a wrong flag is said before that.
    import torch
    import uvicorn

    from serving.app import create_app
    from serving.load import load_served, local_checkpoint, promoted
    from serving.versions import Versions

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
        server.run(sockets=[listener])


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--alias", help="registry alias to serve (default: production)")
    parser.add_argument("--checkpoint", type=Path, help="serve this directory, no registry")
    parser.add_argument(
        "--parent", type=int, help="end when the process of this id, which started us, is gone"
    )
    options = parser.parse_args(arguments)
    if options.checkpoint and not (options.checkpoint / "config.json").is_file():
        parser.error(f"{options.checkpoint} holds no config.json; give a checkpoint directory")
    return options


if __name__ == "__main__":
    main()
