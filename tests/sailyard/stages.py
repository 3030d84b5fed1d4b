"""Small real stages for the tests of the contract, and a yard to run them in."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from sailyard.lineage import records
from sailyard.pipeline import Pipeline, Stage
from sailyard.recipe import Recipe, load_recipe
from sailyard.runs import Run
from sailyard.stage import StageContext, StopRequested
from sailyard.yard import Yard

NUM_STEPS = 40
SAVE_EVERY = 5


def draw(ctx: StageContext) -> None:
    """Makes a file out of the seed and a recipe field."""
    count = ctx.section("world").num_images
    text = f"{ctx.seed} {count}\n"
    (ctx.output("numbers") / "deep").mkdir()
    (ctx.output("numbers") / "deep" / "numbers.txt").write_text(text)
    ctx.output_meta("numbers", {"count": count})
    ctx.summary(count=count)


def draw_otherwise(ctx: StageContext) -> None:
    """As ``draw``, but it comes out different: what a stage that is not deterministic does."""
    (ctx.output("numbers") / "deep").mkdir()
    (ctx.output("numbers") / "deep" / "numbers.txt").write_text("otherwise\n")


def train(ctx: StageContext) -> None:
    """Hashes its input over and over, as a training loop does with weights."""
    state = {"step": 0, "hash": (ctx.input("numbers") / "deep" / "numbers.txt").read_text()}
    latest = ctx.checkpoints.latest()
    if latest is not None:
        step, folder = latest
        state = json.loads((folder / "state.json").read_text())
        assert state["step"] == step
        print(f"resumed at {step}")
    while state["step"] < NUM_STEPS:
        state["hash"] = hashlib.sha256(f"{state}".encode()).hexdigest()
        state["step"] += 1
        time.sleep(0.01)
        ctx.metric(state["step"], loss=1 / state["step"], first=int(state["hash"][0], 16))
        ctx.progress(state["step"], NUM_STEPS, "hashing")
        if os.environ.get("HANG_AT") == str(state["step"]):
            time.sleep(600)
        if os.environ.get("STOP_AT") == str(state["step"]):
            os.kill(os.getpid(), signal.SIGTERM)
        stop = ctx.stop_requested
        if state["step"] % SAVE_EVERY == 0 or stop:
            _save(ctx, state)
        if stop:
            raise StopRequested
    (ctx.output("weights") / "weights.txt").write_text(state["hash"])
    ctx.summary(loss_first=1.0, loss_last=1 / NUM_STEPS)


def _save(ctx: StageContext, state: dict[str, object]) -> None:
    folder = ctx.scratch() / "save"
    folder.mkdir(exist_ok=True)
    (folder / "state.json").write_text(json.dumps(state))
    ctx.checkpoints.save(int(str(state["step"])), folder)


def fail(ctx: StageContext) -> None:
    """Breaks, with a secret in its message."""
    raise ValueError(f"no image in row 3, and the password is {os.environ.get('SECRET', '')}")


def leave_empty(ctx: StageContext) -> None:
    """Forgets its output."""


def crash(ctx: StageContext) -> None:
    """Dies in native code."""
    print("about to crash")
    os.kill(os.getpid(), signal.SIGSEGV)


def end_at_once(ctx: StageContext) -> None:
    """Ends as a watchdog ends a process that hangs: without another word of its own."""
    print("where it hung", flush=True)
    os._exit(1)


def run_out_of_memory(ctx: StageContext) -> None:
    """Is killed the way the kernel does it."""
    print("about to be killed")
    os.kill(os.getpid(), signal.SIGKILL)


def linger(ctx: StageContext) -> None:
    """Starts helpers, one of them in a session of its own, and waits for ever."""
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    helpers = [subprocess.Popen(command, start_new_session=apart).pid for apart in (False, True)]
    print("helpers", json.dumps(helpers))
    time.sleep(600)


def wait_for_ever(ctx: StageContext) -> None:
    """Is asked to stop while it waits."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(600)


def leave_helper(ctx: StageContext) -> None:
    """Ends well but leaves a process behind that holds the log open."""
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    helper = subprocess.Popen(command, start_new_session=True).pid
    (ctx.output("weights") / "pid.txt").write_text(str(helper))


MODULE = "tests.sailyard.stages"
DRAW = Stage(
    "curation.draw", f"{MODULE}:draw", 1, outputs=("numbers",), sections=("world",), doc="draws"
)
TRAIN = Stage(
    "alignment.train",
    f"{MODULE}:train",
    1,
    inputs={"numbers": "curation.draw/numbers"},
    outputs=("weights",),
    sections=("alignment.warmup",),
    resumable=True,
)


def lone(function: str, *, resumable: bool = False) -> Stage:
    """A stage without inputs, around a function of this module."""
    return Stage(
        f"curation.{function}",
        f"{MODULE}:{function}",
        1,
        outputs=("weights",),
        resumable=resumable,
    )


PIPELINE = Pipeline([DRAW, TRAIN])


def open_run(
    yard: Yard,
    run_id: str = "run-1",
    *,
    pipeline: Pipeline = PIPELINE,
    recipe: Recipe | None = None,
    start_from: str = "",
    force: bool = False,
) -> Run:
    """A run of a pipeline of this module, entered into lineage."""
    recipe = recipe or load_recipe("micro")
    created_at = datetime.now(UTC)
    run = Run(run_id, recipe, (), start_from, force, created_at)
    # A cached property: what lies in the instance's dictionary is what it gives.
    run.__dict__["pipeline"] = pipeline
    records.add_run(
        yard.database,
        run_id,
        recipe_name=recipe.name,
        recipe=recipe.model_dump(mode="json"),
        overrides=[],
        start_from=start_from,
        force=force,
        num_stages=len(pipeline.stages),
        created_at=created_at,
    )
    return run


def read_output(yard: Yard, digest: str, name: str) -> str:
    """Text of a file of an artifact."""
    return Path(yard.artifacts.fetch(digest) / name).read_text()


def main() -> None:
    """``python -m tests.sailyard.stages RUN STAGE``: what ``sailyard stage run`` does."""
    from sailyard.stage.supervisor import supervise

    run_id, stage_name = sys.argv[1:3]
    stages = [
        DRAW,
        TRAIN,
        *map(
            lone,
            (
                "fail",
                "crash",
                "end_at_once",
                "run_out_of_memory",
                "linger",
                "leave_helper",
            ),
        ),
    ]
    yard = Yard()
    run = open_run(yard, run_id, pipeline=Pipeline(stages))
    yard.database.close()
    sys.exit(supervise(yard, run, run.pipeline.stage(stage_name)))


if __name__ == "__main__":
    main()
