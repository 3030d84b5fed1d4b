"""``python -m serving``: serve the promoted version, one of the registry, or a directory."""

from __future__ import annotations

import argparse
import logging
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sailyard.processes import die_with_parent
from serving.settings import ServingSettings

if TYPE_CHECKING:
    from serving.versions import Served, Versions, Wanted

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

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    settings = ServingSettings()
    if options.alias:
        settings = settings.model_copy(update={"alias": options.alias})
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host, options.port))
        host = f"[{options.host}]" if ":" in options.host else options.host
        port = listener.getsockname()[1]
        print(f"serving on http://{host}:{port}", flush=True)
        config = uvicorn.Config(
            create_app(settings, _versions(options, settings, port)),
            log_config=None,
            # A forwarded address must not pass for loopback in front of /admin.
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        server = uvicorn.Server(config)
        server.run(sockets=[listener])


def _versions(options: argparse.Namespace, settings: ServingSettings, port: int) -> Versions:
    """What the flags ask to be served."""
    from serving.load import load_served, local_checkpoint, pinned, promoted
    from serving.versions import Versions

    def load(wanted: Wanted) -> Served:
        return load_served(wanted, settings)

    if options.checkpoint:
        fixed = local_checkpoint(options.checkpoint)
        return Versions(lambda: fixed, load, "")
    nothing = (
        f"nothing is promoted to {settings.alias!r} yet; run the pipeline or "
        "`sailyard promote VERSION`"
    )
    if not options.pinned:
        return Versions(promoted(settings.alias), load, nothing)
    if not settings.version:
        return Versions(lambda: None, load, nothing, idle_is_ready=True)
    from serving.proof import prove

    return Versions(
        pinned(settings.version),
        load,
        "the version is being loaded",
        lambda served: prove(f"http://127.0.0.1:{port}", served, settings),
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--alias", help="registry alias to serve (default: production)")
    target.add_argument("--checkpoint", type=Path, help="serve this directory, no registry")
    target.add_argument(
        "--pinned",
        action="store_true",
        help="serve the checkpoint of SAILYARD_SERVE_VERSION for good, once it has passed the "
        "smoke test; without one, wait to be replaced",
    )
    parser.add_argument(
        "--parent", type=int, help="end when the process of this id, which started us, is gone"
    )
    options = parser.parse_args(arguments)
    if options.checkpoint and not (options.checkpoint / "config.json").is_file():
        parser.error(f"{options.checkpoint} holds no config.json; give a checkpoint directory")
    return options


if __name__ == "__main__":
    main()
