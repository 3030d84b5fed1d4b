"""Recipes: the paper's numbers, strictness, helpful errors, presets, overrides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sailyard.recipe import (
    Recipe,
    RecipeError,
    RLRecipe,
    TrainRecipe,
    build_recipe,
    field_docs,
    get_section,
    load_recipe,
    preset_names,
    recipe_json_schema,
)

PRESETS = [
    "1b", "2b", "2b-anyres", "8b", "a3b", "micro", "micro-moe", "small", "tiny", "tiny-moe",
]  # fmt: skip


def test_the_presets_exist_and_are_named_after_their_files() -> None:
    assert preset_names() == PRESETS
    for name in PRESETS:
        assert load_recipe(name).name == name


def test_defaults_are_the_papers_numbers() -> None:
    """Spec of the paper's Tables 1, 3, 4 and sections 2.1.1, 3.2, 4.2."""
    recipe = load_recipe("2b")
    assert recipe == Recipe()
    rows = {
        # stage: trainable, lr, batch, row length
        "alignment.warmup": (["adapter"], 2e-4, 1920, 8192),
        "alignment.fine_grained": (["vision", "adapter"], 2e-5, 512, 8192),
        "alignment.world_knowledge": (["vision", "adapter", "language"], 1e-5, 512, 8192),
        "pretraining.basic": (["adapter"], 2e-4, 2048, 8192),
        "post_training.longcot_sft": (["vision", "adapter", "language"], 1e-6, 1024, 20480),
        "post_training.think_fusion_sft": (["vision", "adapter", "language"], 1e-6, 1024, 20480),
    }
    for path, expected in rows.items():
        stage = get_section(recipe, path)
        assert (stage.trainable, stage.lr, stage.batch_size, stage.seq_len) == expected, path
    assert recipe.post_training.base_sft_4.seq_len == 16_384
    assert recipe.pretraining.basic.adalrs.enabled
    for stage in (recipe.post_training.verifiable_rl, recipe.post_training.mixed_rl):
        assert (stage.lr, stage.clip_low, stage.clip_high) == (1e-6, 0.20, 0.28)
        assert (stage.max_new_tokens, stage.seq_len) == (4096, 20480)
        assert stage.prompts_per_step * stage.rollouts_per_prompt == pytest.approx(2048, abs=5)
        assert (stage.updates_per_step, stage.rollouts_per_prompt) == (8, 5)
    mixes = recipe.curation.mix
    sizes = [mixes.warmup, mixes.fine_grained, mixes.world_knowledge, mixes.basic, mixes.multitask]
    assert [mix.num_samples / 1e6 for mix in sizes] == [8, 14.7, 36.5, 64, 180]
    assert recipe.model.tokens_per_tile == 256
    assert recipe.model.max_image_tokens == 2816 + 2


def test_full_size_shapes_match_the_public_configs() -> None:
    shapes = {
        name: (
            shape.num_layers,
            shape.hidden_size,
            shape.num_heads,
            shape.num_kv_heads,
            shape.tie_word_embeddings,
        )
        for name in ("1b", "2b", "8b", "a3b")
        for shape in [load_recipe(name).model.language]
    }
    assert shapes == {
        "1b": (28, 1024, 16, 8, True),
        "2b": (28, 2048, 16, 8, True),
        "8b": (36, 4096, 32, 8, False),
        "a3b": (48, 2048, 32, 4, False),
    }
    moe = load_recipe("a3b").model.language.moe
    assert moe is not None
    assert (moe.num_experts, moe.top_k, moe.expert_intermediate_size) == (128, 8, 768)
    assert load_recipe("2b-anyres").model.max_image_tokens == 4096 + 2


@pytest.mark.parametrize("name", PRESETS)
def test_a_stored_recipe_comes_back_equal(name: str) -> None:
    recipe = load_recipe(name)
    assert build_recipe(recipe.model_dump(mode="json")) == recipe


def test_naming_one_field_keeps_the_rest_of_that_stage() -> None:
    recipe = build_recipe({"alignment": {"warmup": {"lr": 1e-3}}})
    assert recipe.alignment.warmup == TrainRecipe(trainable=["adapter"], lr=1e-3, batch_size=1920)
    assert recipe.alignment.fine_grained == Recipe().alignment.fine_grained


def test_sections_are_frozen() -> None:
    recipe = load_recipe("tiny")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.alignment.warmup.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("post_training.longcot_sft.lr=2e-6", "post_training.longcot_sft.lr", 2e-6),
        ("seed=7", "seed", 7),
        ("model.use_thumbnail=false", "model.use_thumbnail", False),
        ("model.language.moe.top_k=1", "model.language.moe.top_k", 1),
        ("model.language.moe=null", "model.language.moe", None),
        ("alignment.warmup.trainable=[vision, adapter]", "alignment.warmup.trainable",
         ["vision", "adapter"]),
        ("alignment.warmup.weights.captions=0.5", "alignment.warmup.weights", {"captions": 0.5}),
        ("data.path=/data/a=b", "data.path", "/data/a=b"),
        ("model.system_message=", "model.system_message", None),
    ],
)  # fmt: skip
def test_overrides_are_yaml_scalars(override: str, path: str, value: Any) -> None:
    if override.endswith("message="):
        with pytest.raises(RecipeError, match=r"model\.system_message: .*valid string"):
            load_recipe("tiny-moe", [override])
    else:
        assert get_section(load_recipe("tiny-moe", [override]), path) == value


def test_later_overrides_win() -> None:
    assert load_recipe("tiny", ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "guess"),
    [
        ("alignment.warmup.lrr=1", "alignment.warmup.lr"),
        ("warmup.lr=1", "alignment.warmup.lr"),
        ("post_trainng.soup.weights={}", "post_training.soup.weights"),
        ("curation.caption2.minscore=3", "curation.caption2.min_score"),
        ("sede=1", "seed"),
        ("model.language.moe.topk=1", "model.language.moe.top_k"),
        ("post_training.mixed_rl.rollouts=4", "post_training.mixed_rl.rollouts_per_prompt"),
    ],
)
def test_unknown_field_names_itself_and_the_nearest_right_one(override: str, guess: str) -> None:
    path = override.partition("=")[0]
    with pytest.raises(RecipeError) as raised:
        load_recipe("tiny", [override])
    assert str(raised.value) == f"{path}: unknown field; did you mean {guess}?"


def test_unknown_field_in_a_file_is_named_the_same_way(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: tiny\nalignment: {warmup: {lr: 1e-3, warmup_ration: 0.1}}\nfoo: 1\n")
    with pytest.raises(RecipeError) as raised:
        load_recipe(str(file))
    assert "alignment.warmup.warmup_ration: unknown field" in str(raised.value)
    assert "did you mean alignment.warmup.warmup_ratio?" in str(raised.value)
    assert "foo: unknown field" in str(raised.value)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("alignment.warmup.lr=-1", r"alignment\.warmup\.lr: .*greater than 0 \(got -1\)"),
        ("alignment.warmup.lr=fast", r"alignment\.warmup\.lr: .*valid number.*'fast'"),
        ("alignment.warmup.lr=.inf", r"alignment\.warmup\.lr: .*finite"),
        ("alignment.warmup.trainable=[]", r"alignment\.warmup: trainable is empty"),
        ("alignment.warmup.trainable=[vit]", r"alignment\.warmup\.trainable\.0: .*'vision'"),
        ("alignment.warmup.trainable=[adapter, adapter]", "names a part twice"),
        ("alignment.warmup.micro_batch_size=3", "micro_batch_size 3 does not divide batch_size 2"),
        ("alignment.warmup.part_lr={language: 1e-4}", r"part_lr names \['language'\]"),
        ("alignment.warmup.weights={captions: 0}", "all zero"),
        ("alignment.warmup.seq_len=4096", r"alignment\.warmup\.seq_len 4096 exceeds"),
        ("alignment.warmup.seq_len=40", "cannot hold one image of 47 tokens"),
        ("model.vision.num_heads=3", "num_heads 3 does not divide hidden_size 128"),
        ("model.vision.patch_size=13", "patch_size 13 does not divide image_size 84"),
        ("model.downsample=4", "patch_size x downsample = 56 does not divide"),
        ("model.language.num_heads=3", "num_kv_heads 2 does not divide num_heads 3"),
        ("model.language.head_dim=31", r"model\.language\.head_dim: .*multiple of 2"),
        ("model.language.moe={num_experts: 4}", "top_k 8 exceeds num_experts 4"),
        ("post_training.mixed_rl.clip_low=0.5", "clip_low 0.5 exceeds clip_high 0.28"),
        ("post_training.mixed_rl.answer_weight=0.5", r"is 0\.9, it must be 1"),
        ("post_training.mixed_rl.max_new_tokens=600", "leaves no room for a prompt"),
        ("pretraining.basic.adalrs.start=0.5", "start 0.5 must come before end 0.4"),
        ("curation.mix.multitask.ngram.n=[]", "name lengths of at least 1"),
        ("deployment.gate=[{metric: a, value: 1}, {metric: a, value: 2}]", "two rules for a >="),
        ("deployment.approval=maybe", r"deployment\.approval: .*'auto' or 'manual'"),
    ],
)
def test_bad_values_name_the_field_and_the_reason(override: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        load_recipe("tiny", [override])


@pytest.mark.parametrize("override", ["seed", "=3", "", "seed=[1"])
def test_malformed_overrides(override: str) -> None:
    with pytest.raises(RecipeError, match="--set"):
        load_recipe("tiny", [override])


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(RecipeError) as raised:
        build_recipe({"seed": -1, "model": {"max_tiles": 0}, "nme": "x"})
    assert len(str(raised.value).splitlines()) == 4


def test_unknown_preset_names_the_nearest_and_lists_all() -> None:
    with pytest.raises(RecipeError, match="did you mean tiny-moe") as raised:
        load_recipe("tiny_moe")
    assert all(name in str(raised.value) for name in PRESETS)
    with pytest.raises(RecipeError, match="no recipe file at"):
        load_recipe("recipes/absent.yaml")


def test_a_file_extends_presets_and_neighbours(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("extends: tiny\nseed: 5\nalignment: {warmup: {lr: 0.5}}\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nalignment: {warmup: {max_steps: 3}}\n")
    recipe = load_recipe(str(tmp_path / "mine.yaml"))
    assert (recipe.name, recipe.seed) == ("mine", 5)
    assert (recipe.alignment.warmup.lr, recipe.alignment.warmup.max_steps) == (0.5, 3)
    assert recipe.model == load_recipe("tiny").model


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("extends: mine.yaml", "in a circle: mine -> mine"),
        ("seed: 1\nseed: 2", "the key 'seed' is given twice"),
        ("- a list", "holds a list"),
        ("seed: [1", "not readable YAML"),
        ("extends: [a]", "extends names one recipe"),
        ("extends: huge", "no recipe named 'huge'"),
        ("seed: !!python/object/apply:os.system ['true']", "not readable YAML"),
    ],
)
def test_unusable_files(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=complaint):
        load_recipe(str(file))


def test_empty_file_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("# nothing\n")
    assert load_recipe(str(tmp_path / "mine.yaml")) == Recipe(name="mine")


def test_every_field_says_what_it_is_and_where_its_number_comes_from() -> None:
    docs = field_docs()
    assert len({doc.path for doc in docs}) == len(docs)
    silent = [doc.path for doc in docs if len(doc.doc) < 10]
    assert silent == []
    # A number needs a source; sections, names and places do not.
    sources = ("paper", "our choice", "released", "qwen", "sail-rl", "adalrs", "dapo", "vlmeval")
    sourceless = [
        doc.path
        for doc in docs
        if doc.type in ("int", "float", "int | None")
        and not any(source in doc.doc.lower() for source in sources)
    ]
    # Inside a section whose numbers are described together, or no number of the method.
    allowed = ("seed", "data.digest", "max_steps", "micro_batch_size")
    assert [path for path in sourceless if not path.endswith(allowed)] == []


def test_documented_default_is_the_real_one() -> None:
    docs = {doc.path: doc.default for doc in field_docs()}
    assert docs["alignment.warmup.lr"] == "0.0002"
    assert docs["alignment.fine_grained.lr"] == "2e-05"
    assert docs["model.language.moe"] == "null"
    assert docs["model.language.moe.top_k"] == "8"
    assert docs["alignment.warmup"] == ""


def test_json_schema_describes_fields_for_editors() -> None:
    schema = recipe_json_schema()
    assert schema["properties"]["seed"]["description"].startswith("Root of all randomness")
    assert schema["additionalProperties"] is False


def test_sections_by_dotted_path() -> None:
    recipe = load_recipe("tiny")
    assert get_section(recipe, "alignment.warmup") is recipe.alignment.warmup
    with pytest.raises(RecipeError, match=r"no alignment\.warmpu; did you mean alignment\.warmup"):
        get_section(recipe, "alignment.warmpu")


def test_micro_is_small_enough_for_seconds() -> None:
    for name in ("micro", "micro-moe"):
        recipe = load_recipe(name)
        for path, stage in recipe.packed_stages():
            steps = stage.steps if isinstance(stage, RLRecipe) else stage.max_steps
            assert steps is not None, path
            assert steps <= 20, path


def test_recipes_load_without_torch() -> None:
    code = (
        "import sys; from sailyard.recipe import load_recipe; load_recipe('tiny'); "
        "import sailyard.artifacts, sailyard.samples, sailyard.media; "
        "assert not {'torch', 'airflow', 'ray', 'streamlit'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
