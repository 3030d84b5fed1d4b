"""Checkpoints: round trips, a fresh process, equal bytes, wrong directories."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Aimv2VisionConfig, Aimv2VisionModel, AutoConfig, Qwen3ForCausalLM

from model.checkpoint import (
    build_from_recipe,
    build_model,
    load_language,
    load_model,
    load_vision,
    save_language,
    save_model,
    save_vision,
)
from model.modeling import SailVLForConditionalGeneration, module_digest, part_digests
from model.shards import CheckpointError
from sailyard.recipe import ModelShape
from tests.model.tiny import network, pack, processor, samples, tokenizer, vision_config


@pytest.mark.parametrize("moe", [False, True])
def test_round_trip(tmp_path, moe):
    model = network(moe)
    save_model(tmp_path / "a", model, processor())
    save_model(tmp_path / "b", model, processor())
    loaded, loaded_processor = load_model(tmp_path / "a")
    assert part_digests(loaded) == part_digests(model)
    assert loaded_processor.image_token_id == model.config.image_token_id
    ids, segments, _, tiles = pack(samples(), 160)
    with torch.no_grad():
        first, second = (m(ids, tiles, attention_mask=segments).logits for m in (model, loaded))
    assert torch.equal(first, second)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "model.safetensors" in names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_checkpoint_does_not_say_where_its_parts_were_read(tmp_path):
    trained = network()
    save_vision(tmp_path / "vision", trained.vision_model)
    save_language(tmp_path / "language", trained.language_model, tokenizer())
    vision = load_vision(tmp_path / "vision")
    language, _ = load_language(tmp_path / "language")
    joined = build_model(vision, language, image_token_id=trained.config.image_token_id)
    save_model(tmp_path / "joined", joined, processor())
    assert str(tmp_path) not in (tmp_path / "joined" / "config.json").read_text()


def test_expert_weights_are_stored_one_by_one_as_qwen_does(tmp_path):
    save_model(tmp_path, network(moe=True), processor())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as weights:
        keys = set(weights.keys())
    prefix = "language_model.model.layers.0.mlp"
    assert f"{prefix}.experts.3.gate_proj.weight" in keys
    assert f"{prefix}.gate.weight" in keys


@pytest.mark.slow
def test_from_pretrained_in_a_fresh_process(tmp_path):
    model = network()
    save_model(tmp_path, model, processor())
    code = (
        "import sys, torch; torch.set_num_threads(1); "
        "from model.modeling import SailVLForConditionalGeneration as M, part_digests; "
        "from tests.model.tiny import TEXTS; from model.tokenizer import train_tokenizer; "
        "print(sorted(part_digests(M.from_pretrained(sys.argv[1])).items())); "
        "print(train_tokenizer(TEXTS * 4, 320).backend_tokenizer.to_str())"
    )
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path), "HF_HUB_OFFLINE": "1"}
    child = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    digests, _, rest = child.stdout.partition("\n")
    assert digests == str(sorted(part_digests(model).items()))
    assert rest.strip() == tokenizer().backend_tokenizer.to_str()


def test_plain_sdpa_gives_the_same_numbers(tmp_path):
    model = network()
    save_model(tmp_path, model, processor())
    plain = SailVLForConditionalGeneration.from_pretrained(tmp_path)
    assert plain.language_model.config._attn_implementation == "sdpa"
    ids, segments, labels, tiles = pack(samples(), 160)
    with torch.no_grad():
        first, second = (
            m(ids, tiles, attention_mask=segments, labels=labels).loss for m in (model, plain)
        )
    torch.testing.assert_close(first, second)


def test_building_is_deterministic_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert part_digests(network(seed=3)) == part_digests(network(seed=3))
    assert torch.equal(torch.get_rng_state(), before)
    first, second = part_digests(network(seed=3)), part_digests(network(seed=4))
    assert all(first[part] != second[part] for part in first)


def test_parts_travel_alone_and_build_again(tmp_path):
    model = network()
    save_vision(tmp_path / "vision", model.vision_model)
    save_language(tmp_path / "language", model.language_model, tokenizer())
    vision = load_vision(tmp_path / "vision")
    language, loaded_tokenizer = load_language(tmp_path / "language")
    section = SimpleNamespace(language=SimpleNamespace(moe=None), downsample=2)
    built = build_from_recipe(section, loaded_tokenizer, vision=vision, language=language, seed=9)
    expected, found = part_digests(model), part_digests(built)
    assert found["vision"] == expected["vision"]
    assert found["language"] == expected["language"]
    assert found["adapter"] != expected["adapter"]
    assert built.config.image_token_id == model.config.image_token_id


@pytest.mark.parametrize("moe", [None, {"num_experts": 4, "top_k": 2}])
def test_a_fresh_decoder_passes_its_embeddings_through(moe):
    narrow = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}
    shape = ModelShape(
        vision={**narrow, "image_size": 56},
        language={**narrow, "num_kv_heads": 1, "vocab_size": 400, "moe": moe},
    )
    language = build_from_recipe(shape, tokenizer(), seed=9).language_model
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        embeds = language.get_input_embeddings()(ids)
        expected = language.lm_head(language.model.norm(embeds))
        assert torch.equal(language(ids).logits, expected)


def test_a_fresh_adapter_makes_visual_tokens_as_long_as_words():
    narrow = {"hidden_size": 64, "num_layers": 1, "num_heads": 2, "intermediate_size": 48}
    shape = ModelShape(
        vision={**narrow, "image_size": 56},
        language={**narrow, "num_kv_heads": 1, "vocab_size": 400},
    )
    model = build_from_recipe(shape, tokenizer(), seed=9)
    with torch.no_grad():
        visual = model.encode_images(torch.randn(4, 3, 56, 56)).flatten(0, 1)
    words = model.get_input_embeddings().weight
    ratio = visual.norm(dim=-1).mean() / words.norm(dim=-1).mean()
    assert 0.67 < ratio < 1.5


def test_the_language_directory_is_an_ordinary_qwen3(tmp_path):
    model = network()
    save_language(tmp_path, model.language_model, tokenizer())
    assert AutoConfig.from_pretrained(tmp_path).model_type == "qwen3"
    plain = Qwen3ForCausalLM.from_pretrained(tmp_path)
    assert module_digest(plain) == module_digest(model.language_model)


def test_an_aimv2_encoder_loads_without_its_head(tmp_path):
    config = Aimv2VisionConfig(
        **{k: v for k, v in vision_config().to_dict().items() if k != "model_type"}
        | {"use_head": True}
    )
    encoder = Aimv2VisionModel(config).eval()
    encoder.save_pretrained(tmp_path)
    vision = load_vision(tmp_path)
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = encoder(pixels).last_hidden_state
        torch.testing.assert_close(vision.encode(pixels), expected)
    assert not any(name.startswith("head") for name, _ in vision.named_parameters())


def test_wrong_directories_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no directory"):
        load_model(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_model(tmp_path)
    save_vision(tmp_path, network().vision_model)
    with pytest.raises(CheckpointError, match="'sailvit' model where sailvl is needed"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, at: t.pop(f"{at}layers.1.mlp.up_proj.weight"), r"up_proj\.weight is missing"),
        (lambda t, at: t.update({f"{at}stray": torch.zeros(3)}), "stray has no place in this"),
        (
            lambda t, at: t.update({f"{at}norm.weight": torch.zeros(31)}),
            r"norm\.weight: expected \[32\], found \[31\]",
        ),
    ],
)
def test_a_tensor_at_fault_is_named_and_never_drawn_at_random(tmp_path, change, message):
    save_model(tmp_path / "whole", network(), processor())
    save_language(tmp_path / "language", network().language_model, tokenizer())
    for directory, prefix, load in (
        (tmp_path / "whole", "language_model.model.", load_model),
        (tmp_path / "language", "model.", load_language),
    ):
        tensors = load_file(directory / "model.safetensors")
        change(tensors, prefix)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            load(directory)


def test_a_tower_and_a_file_cut_off_are_named(tmp_path):
    save_vision(tmp_path, network().vision_model)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"is cut off inside \S+ \["):
        load_vision(tmp_path)
    file.write_bytes(whole)
    tensors = load_file(file)
    tensors.pop("rms_norm.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"rms_norm\.weight is missing"):
        load_vision(tmp_path)
