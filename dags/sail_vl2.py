"""The SAIL-VL2 pipeline as an Airflow DAG, drawn from the graph that sailyard/pipeline declares.

This file is parsed again and again by a scheduler that carries no GPU stack: it imports no torch,
and nothing heavy beyond Airflow itself.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param, TaskGroup, get_current_context, task

from operators.launchers import LAUNCHERS
from operators.run_task import CREATE_RUN, create_run_from_params
from operators.stage_operator import StageOperator
from sailyard.pipeline import Pipeline, build_pipeline
from sailyard.recipe import load_recipe, preset_names

DOC = """
### SAIL-VL2: from raw image-text data to a served checkpoint

Trigger it with the form. **recipe** is a preset or the path of a YAML file; **overrides** change
single fields of it, one `a.b.c=value` a line. A stage whose code, recipe section and inputs have
not changed is reused; **force** runs everything again. **start_from** runs that stage and what
follows from it, and takes the rest from earlier runs. **data** names a folder of your own images
and captions to mix in.

A task whose log says that it is not part of the recipe belongs to another kind of model (expert
calibration: mixture-of-experts only). Stopping a task ends its processes; trying it again resumes
from its last checkpoint. The *Lineage* button of a task opens the board at what it read and made.
"""


def params(pipeline: Pipeline) -> dict[str, Param]:
    """The trigger form."""
    return {
        "recipe": Param(
            "tiny",
            type="string",
            examples=preset_names(),
            description="A preset, or the path of a recipe file.",
        ),
        "overrides": Param(
            [],
            type="array",
            items={"type": "string", "pattern": r"^[\w.]+=.*$"},
            description="Recipe fields to change, one a line: post_training.longcot_sft.lr=2e-6",
        ),
        "start_from": Param(
            "",
            type="string",
            enum=["", *(stage.name for stage in pipeline.stages)],
            description="Run only this stage and what follows from it; reuse the rest.",
        ),
        "force": Param(
            False, type="boolean", description="Run stages again although they have finished."
        ),
        "launcher": Param(
            "local",
            type="string",
            enum=list(LAUNCHERS),
            description="Where the stages run: local = subprocesses of the Airflow worker, "
            "kubernetes = Jobs of the cluster that SAILYARD_CLUSTER_* describe.",
        ),
        "data": Param(
            "",
            type="string",
            description="Your own images and captions: a folder, a tar, a Parquet file.",
        ),
    }


# A moment without the API server or the store is no reason to fail a run before it has begun.
@task(
    task_id=CREATE_RUN,
    doc="Resolve the recipe and enter the run into the lineage.",
    retries=2,
    retry_delay=timedelta(seconds=5),
)
def create_run() -> str:
    return create_run_from_params(get_current_context()["params"])


def build_dag() -> DAG:
    """One task group a part of the pipeline, one task a stage, the graph's edges."""
    # The mixture-of-experts graph has every stage that a dense one has, and expert calibration.
    pipeline = build_pipeline(load_recipe("tiny-moe"))
    with DAG(
        "sail_vl2",
        schedule=None,
        catchup=False,
        params=params(pipeline),
        doc_md=DOC,
        description="Curate, align, pretrain, post-train, evaluate and release a SAIL-VL2 model.",
        tags=["sailyard"],
        # A stage that the recipe does not have is skipped; what follows it still runs.
        default_args={"trigger_rule": "none_failed"},
    ) as dag:
        run = create_run()
        tasks: dict[str, StageOperator] = {}
        for group, stages in pipeline.groups.items():
            with TaskGroup(group):
                for stage in stages:
                    name = stage.name.removeprefix(f"{group}.")
                    tasks[stage.name] = StageOperator(
                        task_id=name, stage=stage.name, doc_md=stage.doc
                    )
        for name, operator in tasks.items():
            upstream = pipeline.upstream(name)
            (run if not upstream else [tasks[other] for other in upstream]) >> operator
    return dag


dag = build_dag()
