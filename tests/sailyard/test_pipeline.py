"""The declared graph: it holds together, and its sections exist in every recipe."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from sailyard.pipeline import (
    EVALUATED,
    GROUPS,
    Pipeline,
    PipelineError,
    Stage,
    UnknownStage,
    build_pipeline,
)
from sailyard.recipe import Recipe, load_recipe, preset_names
from sailyard.stage import cache_key, resolve_section

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["micro", "micro-moe"])
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return load_recipe(request.param)


def test_every_input_is_an_output_of_an_earlier_stage(recipe: Recipe) -> None:
    made: set[str] = set()
    for stage in build_pipeline(recipe).stages:
        assert set(stage.inputs.values()) <= made, stage.name
        made |= {f"{stage.name}/{output}" for output in stage.outputs}


@pytest.mark.parametrize("name", preset_names())
def test_every_section_resolves_in_every_preset(name: str) -> None:
    recipe = load_recipe(name)
    for stage in build_pipeline(recipe).stages:
        for section in stage.sections:
            resolve_section(recipe, section)
        digests = dict.fromkeys(stage.inputs, "0" * 64)
        assert len(cache_key(stage, recipe, digests)) == 64


def test_the_design_table_is_there_in_order() -> None:
    names = [stage.name for stage in build_pipeline(load_recipe("tiny")).stages]
    spine = [
        "curation.ingest",
        "bootstrap.vision",
        "curation.judges",
        "alignment.warmup",
        "alignment.fine_grained",
        "alignment.world_knowledge",
        "pretraining.basic",
        "pretraining.multitask",
        "post_training.base_sft_1",
        "post_training.base_sft_4",
        "post_training.soup",
        "post_training.longcot_sft",
        "post_training.verifiable_rl",
        "post_training.think_fusion_sft",
        "post_training.mixed_rl",
        "evaluation.suite",
        "deployment.register",
        "deployment.gate",
        "deployment.promote",
        "deployment.smoke_test",
    ]
    positions = [names.index(name) for name in spine]
    assert positions == sorted(positions)
    assert len(names) == 41


def test_only_a_mixture_of_experts_is_calibrated() -> None:
    calibration = "pretraining.expert_calibration"
    dense = build_pipeline(load_recipe("tiny"))
    moe = build_pipeline(load_recipe("tiny-moe"))
    assert {s.name for s in moe.stages} - {s.name for s in dense.stages} == {calibration}
    assert moe.stage("pretraining.basic").inputs["language"] == f"{calibration}/language"
    bootstrap = "bootstrap.language/language"
    assert dense.stage("pretraining.basic").inputs["language"] == bootstrap


def test_groups_hold_every_stage_once(recipe: Recipe) -> None:
    pipeline = build_pipeline(recipe)
    grouped = [stage.name for stages in pipeline.groups.values() for stage in stages]
    assert sorted(grouped) == sorted(stage.name for stage in pipeline.stages)
    assert tuple(pipeline.groups) == GROUPS


def test_neighbours_and_reach() -> None:
    pipeline = build_pipeline(load_recipe("tiny"))
    assert pipeline.upstream("post_training.soup") == (
        "post_training.base_sft_4",
        "post_training.base_sft_4_sibling",
    )
    assert pipeline.downstream("deployment.gate") == ("deployment.promote",)
    assert "curation.ingest" in pipeline.ancestors("post_training.soup")
    assert "deployment.smoke_test" in pipeline.descendants("curation.ingest")
    assert pipeline.descendants("deployment.smoke_test") == frozenset()
    assert set(EVALUATED) < pipeline.ancestors("evaluation.suite")


def test_the_soups_second_ingredient_differs_by_name_alone() -> None:
    pipeline = build_pipeline(load_recipe("tiny"))
    one = pipeline.stage("post_training.base_sft_4")
    two = pipeline.stage("post_training.base_sft_4_sibling")
    assert (one.inputs, one.sections, one.entry) == (two.inputs, two.sections, two.entry)


def test_an_unknown_stage_is_answered_with_the_nearest() -> None:
    pipeline = build_pipeline(load_recipe("tiny"))
    with pytest.raises(UnknownStage, match=r"did you mean 'alignment\.warmup'"):
        pipeline.stage("alignment.warm_up")


def test_a_graph_that_does_not_hold_together_is_refused() -> None:
    one = Stage("a.one", "m:f", 1, inputs={"x": "a.two/y"}, outputs=("x",))
    two = Stage("a.two", "m:f", 1, inputs={"x": "a.one/x"}, outputs=("y",))
    with pytest.raises(PipelineError, match=r"wait for each other: a\.one, a\.two"):
        Pipeline([one, two])
    with pytest.raises(PipelineError, match=r"'a\.two/y', which no stage produces"):
        Pipeline([one])
    with pytest.raises(PipelineError, match=r"more than once: a\.one"):
        Pipeline([one, one])


def test_cache_keys_do_not_move_when_a_recipe_is_renamed() -> None:
    """Registering a model is the exception: its name is what is registered."""
    recipe, renamed = load_recipe("tiny"), load_recipe("tiny", ["name=other"])
    moved = []
    for stage in build_pipeline(recipe).stages:
        digests = dict.fromkeys(stage.inputs, "0" * 64)
        if cache_key(stage, recipe, digests) != cache_key(stage, renamed, digests):
            moved.append(stage.name)
    assert moved == ["deployment.register"]


def in_a_fresh_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_importing_the_graph_is_fast_and_light() -> None:
    code = (
        "import time; start = time.process_time(); import sailyard.pipeline, sys; "
        "print(time.process_time() - start, "
        "*[m for m in ('pydantic', 'sqlalchemy', 'minio', 'pyarrow', 'rich') if m in sys.modules])"
    )
    seconds, *heavy = in_a_fresh_python(code).split()
    assert heavy == []
    assert float(seconds) < 0.3


@pytest.mark.slow
def test_nothing_in_the_package_imports_torch() -> None:
    code = (
        "import pkgutil, importlib, sys, sailyard\n"
        "for module in pkgutil.walk_packages(sailyard.__path__, 'sailyard.'):\n"
        "    if '.migrations' not in module.name and not module.name.endswith('__main__'):\n"
        "        importlib.import_module(module.name)\n"
        "heavy = 'torch', 'transformers', 'airflow', 'streamlit', 'ray', 'deepspeed'\n"
        "print(*[name for name in heavy if name in sys.modules])"
    )
    assert in_a_fresh_python(code) == ""


def test_every_entry_is_a_function_that_exists(recipe: Recipe) -> None:
    """Read, not imported: entries bring torch, and a scheduler must never need it."""
    for stage in build_pipeline(recipe).stages:
        for name in filter(None, (stage.entry, stage.restore)):
            module, _, function = name.partition(":")
            tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text())
            found = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
            assert function in found, name
