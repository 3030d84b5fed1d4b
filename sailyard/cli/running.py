"""``sailyard run`` and ``sailyard stage``."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sailyard.cli.output import console, duration, print_json, print_table

if TYPE_CHECKING:
    from sailyard.local import StageEnd
    from sailyard.runs import Run
    from sailyard.yard import Yard

stage_app = typer.Typer(help="Single stages.", no_args_is_help=True)


def run(
    recipe: Annotated[str, typer.Option(help="Preset name or path of a YAML file.")] = "tiny",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Recipe override, a.b.c=value; repeatable.")
    ] = None,
    start_from: Annotated[
        str, typer.Option("--from", help="Start at this stage; earlier ones are only reused.")
    ] = "",
    force: Annotated[bool, typer.Option(help="Run stages again that are finished.")] = False,
    data: Annotated[Path | None, typer.Option(help="Your own data, mixed in.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Stages at a time.")] = 1,
    resume: Annotated[str, typer.Option(help="Go on with this run instead of a new one.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Run the whole pipeline on this machine."""
    from sailyard.cli.progress import GraphView, hashing_bar
    from sailyard.local import run_graph
    from sailyard.runs import create_run, load_run
    from sailyard.yard import Yard

    yard = Yard()
    if resume:
        run_id = resume
    else:
        with hashing_bar(console, quiet=as_json or data is None) as on_hash:
            run_id = create_run(
                recipe,
                overrides or (),
                start_from=start_from or None,
                force=force,
                data=data,
                yard=yard,
                on_hash=on_hash,
            )
    loaded = load_run(run_id, yard)
    # Told to end, or its terminal closed, is Ctrl-C by another name: stages live in sessions of
    # their own and would outlive this process.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with GraphView(yard, loaded, quiet=as_json) as view:
        try:
            ends = run_graph(yard, loaded, jobs=jobs, observer=view.observer())
        except KeyboardInterrupt:
            view.say(f"stopped; go on with: sailyard run --resume {run_id}")
            raise typer.Exit(130) from None
    _conclude(yard, loaded, ends, as_json)


def _conclude(yard: Yard, loaded: Run, ends: list[StageEnd], as_json: bool) -> None:
    from sailyard.local import describe_exit

    broken = [end for end in ends if end.code]
    if as_json:
        outcome = {
            "run": loaded.id,
            "finished": not broken and len(ends) == len(loaded.pipeline.stages),
            "stages": ends,
        }
        print_json(outcome)
    elif not broken:
        reused = sum(end.cached for end in ends)
        total = duration(sum(end.seconds for end in ends))
        console.print(f"run {loaded.id}: {len(ends)} stages, {reused} reused, {total}")
    for end in broken:
        print(
            f"{end.stage}: {describe_exit(end.code)}; its log: "
            f"sailyard stage log {end.stage} --run {loaded.id}",
            file=sys.stderr,
        )
    if broken:
        raise typer.Exit(broken[0].code if broken[0].code > 0 else 1)


@stage_app.command("run")
def stage_run(
    name: Annotated[str, typer.Argument(help="Stage name.")],
    run_id: Annotated[str, typer.Option("--run", help="Run the stage belongs to.")],
    force: Annotated[bool, typer.Option(help="Run it even if it is finished.")] = False,
) -> None:
    """Run one stage: the command inside every process and pod.

    Exit status 0: finished, now or before. 75: stopped, run it again. 1: failed.
    """
    from sailyard.runs import load_run
    from sailyard.stage.ranks import Rank, be_alone
    from sailyard.stage.torchrun import run_ranks
    from sailyard.yard import Yard

    yard = Yard()
    loaded = load_run(run_id, yard)
    stage, rank = loaded.pipeline.stage(name), Rank.from_environment()
    if rank.number:
        from sailyard.stage.follower import follow

        raise typer.Exit(follow(yard, loaded, stage, rank))
    if not stage.distributed:
        be_alone()
    elif rank.size == 1 and yard.settings.ranks > 1:
        raise typer.Exit(run_ranks(yard, loaded, stage, yard.settings.ranks, force=force))
    from sailyard.stage.supervisor import supervise

    raise typer.Exit(supervise(yard, loaded, stage, force=force))


@stage_app.command("log")
def stage_log(
    name: Annotated[str, typer.Argument(help="Stage name.")],
    run_id: Annotated[str, typer.Option("--run", help="Run the stage belongs to.")],
) -> None:
    """Print the end of a stage's log, as kept in the store."""
    from sailyard import runs

    loaded = runs.load_run(run_id)
    sys.stdout.write(runs.stage_log(run_id, loaded.pipeline.stage(name).name))


@stage_app.command("list")
def stage_list(
    recipe: Annotated[str, typer.Option(help="Preset name or path of a YAML file.")] = "tiny",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the stages a recipe runs, in order."""
    from sailyard.pipeline import build_pipeline
    from sailyard.recipe import load_recipe

    pipeline = build_pipeline(load_recipe(recipe))
    rows = [
        {
            "name": stage.name,
            "inputs": dict(stage.inputs),
            "outputs": list(stage.outputs),
            "sections": list(stage.sections),
            "resumable": stage.resumable,
            "gpus": stage.gpus,
            "doc": stage.doc,
        }
        for stage in pipeline.stages
    ]
    if as_json:
        print_json(rows)
    else:
        print_table("", ("stage", "what it does"), [(row["name"], row["doc"]) for row in rows])
