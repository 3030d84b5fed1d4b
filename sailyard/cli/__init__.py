"""The command line. Each command imports what it needs when it runs: ``--help`` is instant."""

from __future__ import annotations

import sys

import typer

from sailyard.cli.data import ingest
from sailyard.cli.doctor import doctor
from sailyard.cli.look import lineage, report, status
from sailyard.cli.models import promote, rollback, serve
from sailyard.cli.network import model_app
from sailyard.cli.output import errors
from sailyard.cli.planning import plan
from sailyard.cli.running import run, stage_app
from sailyard.cli.setup import setup

commands = typer.Typer(
    name="sailyard",
    help="Builds vision-language models, from raw image-text data to a served checkpoint.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
commands.command()(run)
commands.add_typer(stage_app, name="stage")
commands.add_typer(model_app, name="model")
for command in (plan, status, report, lineage, ingest, promote, rollback, serve, setup, doctor):
    commands.command()(command)


def app() -> None:
    """Run the command line; what a user can get wrong ends in one line, not in a traceback."""
    try:
        commands()
    except (ValueError, OSError) as error:
        from sailyard.yard import Yard

        try:
            text = Yard().redact(str(error))
        except ValueError:  # the settings themselves are what is wrong
            text = str(error)
        errors.print(f"error: {text}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
