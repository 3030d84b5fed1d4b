"""The DAG files: cheap to parse, true to the graph, understood by Airflow."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import sailyard
from sailyard.pipeline import build_pipeline
from sailyard.recipe import load_recipe, preset_names

ROOT = Path(sailyard.__file__).parents[1]
LIGHT_ROOMS = ("sailyard", "operators", "dags", "dashboard")

PARSE = """
import json, runpy, sys, time
import airflow.sdk, airflow.sdk.exceptions
import airflow.providers.standard.operators.hitl
spent = {}
for path in sys.argv[1:]:
    started = time.process_time()
    names = runpy.run_path(path)
    spent[path] = (time.process_time() - started, names["dag"].dag_id)
print(json.dumps(spent))
"""

IMPORT_ALL = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def run_python(code: str, *arguments: str) -> str:
    """Output's last line of a fresh interpreter that has imported nothing yet."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def modules_of(room: str) -> list[str]:
    """The room's importable modules. Scripts that do their work when imported are left out."""
    found = pkgutil.walk_packages([str(ROOT / room)], prefix=f"{room}.")
    names = [module.name for module in found if not module.name.endswith("__main__")]
    return [room, *(name for name in names if "versions." not in name and ".env" not in name)]


@pytest.mark.slow
def test_dag_files_parse_in_under_a_second() -> None:
    files = sorted(str(path) for path in (ROOT / "dags").glob("*.py") if path.stem != "__init__")
    spent = json.loads(run_python(PARSE, *files))
    assert {dag_id for _, dag_id in spent.values()} == {"sail_vl2", "promote"}
    for path, (seconds, _) in spent.items():
        assert seconds < 1.0, f"{path} took {seconds:.2f} s beyond importing Airflow"


@pytest.mark.slow
@pytest.mark.parametrize("room", LIGHT_ROOMS)
def test_rooms_without_a_gpu_stack_import_none(room: str) -> None:
    loaded = set(json.loads(run_python(IMPORT_ALL, *modules_of(room))))
    heavy = {"torch", "transformers", "deepspeed", "ray"}
    if room == "sailyard":
        heavy |= {"airflow", "streamlit"}
    if room != "dashboard":
        heavy |= {"streamlit"}
    assert not loaded & heavy


@pytest.mark.slow
@pytest.mark.airflow
def test_the_dag_has_every_stage_and_edge_of_every_recipe() -> None:
    from dags.sail_vl2 import dag

    for name in preset_names():
        pipeline = build_pipeline(load_recipe(name))
        for stage in pipeline.stages:
            task = dag.get_task(stage.name)
            assert task.task_group.group_id == stage.group
            ancestors = task.get_flat_relative_ids(upstream=True)
            assert ancestors >= set(pipeline.ancestors(stage.name)), f"{name}: {stage.name}"
            assert "create_run" in ancestors


@pytest.mark.slow
@pytest.mark.airflow
def test_airflow_can_store_the_dags_and_show_the_form() -> None:
    from airflow.serialization.serialized_objects import DagSerialization

    from dags import promote, sail_vl2

    for dag in (sail_vl2.dag, promote.dag):
        stored = json.dumps(DagSerialization.to_dict(dag))
        read_back = DagSerialization.from_dict(json.loads(stored))
        assert set(read_back.task_ids) == set(dag.task_ids)
        assert dag.doc_md
        dag.params.validate()
    assert set(sail_vl2.dag.params) == {
        *("recipe", "overrides", "start_from", "force", "launcher", "data")
    }
