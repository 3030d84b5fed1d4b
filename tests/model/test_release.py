"""The released layout: names, round trips, equal logits, and every way to be broken."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from model.checkpoint import load_model, save_model
from model.counting import empty_model
from model.inspection import inspect
from model.layouts import released_views
from model.modeling import SailVLForConditionalGeneration
from model.release import check_native, convert, load_released, save_released
from model.release_config import parse_config, released_body
from model.shards import INDEX, SINGLE, CheckpointError, read_headers
from tests.model.tiny import image, network, pack, processor, samples

QKV = "vision_model.trunk.blocks.1.attn.qkv.weight"
NORM = "language_model.model.norm.weight"
HEAD = "language_model.lm_head.weight"


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same_tensors(first: Path, second: Path) -> None:
    one, other = tensors_of(first), tensors_of(second)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


def logits(model: SailVLForConditionalGeneration) -> torch.Tensor:
    ids, segments, _, tiles = pack(samples(), 160)
    with torch.no_grad():
        out: torch.Tensor = model(ids, tiles, attention_mask=segments).logits
    return out


@pytest.fixture
def released(tmp_path: Path) -> Path:
    save_released(tmp_path / "released", network().to(torch.bfloat16), processor())
    return tmp_path / "released"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moe", [False, True])
def test_there_and_back_keeps_bytes_logits_and_config(tmp_path, moe, dtype):
    start, first, ours, again = (tmp_path / name for name in ("start", "first", "ours", "again"))
    save_model(start, network(moe).to(dtype), processor())
    model, _ = load_model(start, dtype)  # its rotary table is float32, which to() had rounded
    save_released(first, model, processor(), shard_bytes=20_000)
    assert len(json.loads((first / INDEX).read_text())["weight_map"]) == len(read_headers(first))
    loaded, _ = load_released(first)
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))

    body = json.loads((first / "config.json").read_text())
    body |= {"template": "another", "max_dynamic_patch": 7, "somebody": {"else": "key"}}
    body["llm_config"]["rope_theta"] = int(body["llm_config"]["rope_theta"])
    (first / "config.json").write_text(json.dumps(body))
    convert(first, ours, "native")
    native, native_processor = load_model(ours, dtype)
    assert torch.equal(logits(native), logits(model))
    assert native_processor.image_token_id == native.config.image_token_id

    assert_same_tensors(start, ours)
    convert(ours, again, "released")
    assert_same_tensors(first, again)
    text = (again / "config.json").read_text()
    assert json.loads(text) == body
    assert f'"rope_theta": {body["llm_config"]["rope_theta"]},' in text


def test_ours_to_released_and_back_is_ours(tmp_path):
    save_model(tmp_path / "ours", network(moe=True), processor(max_tiles=3))
    convert(tmp_path / "ours", tmp_path / "released", "released")
    convert(tmp_path / "released", tmp_path / "again", "native")
    assert_same_tensors(tmp_path / "ours", tmp_path / "again")
    first, again = ((tmp_path / name / "processor_config.json") for name in ("ours", "again"))
    assert first.read_bytes() == again.read_bytes()


def test_the_tower_computes_what_the_released_code_does(tmp_path):
    """Written from the facts about the released modules, on released tensors alone."""
    model = network()
    save_released(tmp_path, model, processor())
    weights = tensors_of(tmp_path)

    def get(name: str) -> torch.Tensor:
        return weights[f"vision_model.{name}"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * get(name)

    pixels = torch.from_numpy(samples()[1].pixel_values)
    patchifier = "preprocessor.patchifier"
    x = F.conv2d(pixels, get(f"{patchifier}.proj.weight"), get(f"{patchifier}.proj.bias"), 14)
    x = norm(x.flatten(2).transpose(1, 2), f"{patchifier}.norm.weight")
    x = x + get("preprocessor.pos_embed")
    for number in range(2):
        block = f"trunk.blocks.{number}"
        fused = norm(x, f"{block}.norm_1.weight") @ get(f"{block}.attn.qkv.weight").T
        q, k, v = fused.view(len(x), -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + mixed @ get(f"{block}.attn.proj.weight").T
        h = norm(x, f"{block}.norm_2.weight")
        gate = F.silu(h @ get(f"{block}.mlp.fc1.weight").T)
        x = x + (gate * (h @ get(f"{block}.mlp.fc3.weight").T)) @ get(f"{block}.mlp.fc2.weight").T
    expected = norm(x, "trunk.post_trunk_norm.weight")
    with torch.no_grad():
        torch.testing.assert_close(model.vision_model.encode(pixels), expected)


def test_without_our_processor_file_the_released_ones_are_read(released):
    (released / "processor_config.json").unlink()
    _, found = load_released(released)
    assert found.max_tiles == 4
    assert found.system_message.startswith("你是")
    encoded = found.encode([{"role": "user", "content": "<image>"}], [image(1)])
    assert len(encoded.pixel_values) == 1
    (released / "preprocessor_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: max_dynamic_patch is m"):
        load_released(released)


def test_a_fresh_config_says_what_the_released_one_does(released):
    body = json.loads((released / "config.json").read_text())
    assert body["architectures"] == ["SAILVLModel"]
    assert body["auto_map"]["AutoConfig"] == "configuration_sailvl.SAILVLConfig"
    assert (body["downsample_ratio"], body["ps_version"], body["select_layer"]) == (0.5, "v2", -1)
    assert (body["force_image_size"], body["torch_dtype"]) == (56, "bfloat16")
    assert body["llm_config"]["architectures"] == ["Qwen3ForCausalLM"]
    assert body["llm_config"]["rope_theta"] == 10000.0
    config = parse_config(body, image_token_id=5)
    assert config.image_token_id == 5
    assert released_body(config, torch.bfloat16, True) == body


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / SINGLE)
        change(tensors)
        save_file(tensors, directory / SINGLE)

    return edit


def edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        body = json.loads((directory / "config.json").read_text())
        change(body)
        (directory / "config.json").write_text(json.dumps(body))

    return edit


def cut(directory: Path) -> None:
    file = directory / SINGLE
    file.write_bytes(file.read_bytes()[:-100])


BROKEN = {
    "missing tensor": (
        edit_tensors(lambda t: t.pop(QKV)),
        r"blocks\.1\.attn\.qkv\.weight is missing: expected \[48, 16\], found none",
    ),
    "extra tensor": (
        edit_tensors(lambda t: t.update(stray=torch.zeros(3))),
        r"stray has no place in this network: expected none, found \[3\]",
    ),
    "wrong shape": (
        edit_tensors(lambda t: t.update({QKV: torch.zeros(48, 15, dtype=torch.bfloat16)})),
        r"qkv\.weight: expected \[48, 16\], found \[48, 15\]; take config",
    ),
    "wrong type": (
        edit_tensors(lambda t: t.update({NORM: torch.zeros(32)})),
        r"norm\.weight \[32\]: expected torch\.bfloat16, found torch\.float32",
    ),
    "untied head": (
        edit_tensors(lambda t: t[HEAD].add_(1)),
        r"lm_head\.weight and .* differ.*tie_word_embeddings to false",
    ),
    "truncated": (cut, r"is cut off inside \S+ \[.*\]: expected at least \d+ bytes, found \d+"),
    "a pointer": (
        lambda d: (d / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\n"),
        r"cut off inside its header, or no safetensors file \(\d+ bytes",
    ),
    "no weights": (lambda d: (d / SINGLE).unlink(), "only safetensors are read, never pickles"),
    "no config": (lambda d: (d / "config.json").unlink(), r"holds no config\.json"),
    "foreign": (
        edit_config(lambda c: c.update(model_type="internvl_chat")),
        "model_type must be 'sailvl', found 'internvl_chat'",
    ),
    "missing key": (
        edit_config(lambda c: c["llm_config"].pop("rope_theta")),
        r"config\.json: llm_config\.rope_theta is missing",
    ),
    "class default": (edit_config(lambda c: c.pop("ps_version")), r"ps_version is missing"),
    "another merge": (
        edit_config(lambda c: c.update(ps_version="v1")),
        "ps_version must be 'v2', found 'v1'",
    ),
    "another layer": (
        edit_config(lambda c: c.update(select_layer=-4)),
        "select_layer must be -1, found -4",
    ),
    "wrong depth": (
        edit_config(lambda c: c["vision_config"].update(num_hidden_layers=3)),
        r"blocks\.2\.\S+ is missing",
    ),
    "wrong kind of value": (
        edit_config(lambda c: c["llm_config"].update(hidden_size="wide")),
        r"config\.json: .*hidden_size",
    ),
    "no number": (
        edit_config(lambda c: c["llm_config"].update(rope_theta=None)),
        r"config\.json: .*float.* 'NoneType'",
    ),
    "neither layout": (
        edit_config(lambda c: c.pop("llm_config")),
        r"config\.json: llm_config \(released layout\) or text_config \(native\) is missing",
    ),
    "no such ratio": (
        edit_config(lambda c: c.update(downsample_ratio=0.4)),
        r"downsample_ratio must be 1 over a whole number, as 0\.5, found 0\.4",
    ),
    "no such type": (
        edit_config(lambda c: c.update(torch_dtype="int8")),
        "torch_dtype must be one of bfloat16, float16, float32, found 'int8'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named(released, case):
    assert inspect(released).problem == ""
    damage, message = BROKEN[case]
    damage(released)
    with pytest.raises(CheckpointError, match=message):
        load_released(released)
    assert re.search(message, inspect(released).problem)


def test_a_broken_index_is_named(tmp_path):
    save_released(tmp_path, network(), processor(), shard_bytes=20_000)
    index = json.loads((tmp_path / INDEX).read_text())
    file = index["weight_map"][NORM]

    def write(weight_map: dict[str, str]) -> None:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    write(dict.fromkeys(index["weight_map"], "../other.safetensors"))
    with pytest.raises(CheckpointError, match="points outside its directory"):
        read_headers(tmp_path)
    write({name: file for name, file in index["weight_map"].items() if name != NORM})
    with pytest.raises(CheckpointError, match=f"holds {NORM}, which"):
        read_headers(tmp_path)
    write(index["weight_map"] | {NORM: index["weight_map"][QKV]})
    with pytest.raises(CheckpointError, match=f"says that {NORM} lies in"):
        read_headers(tmp_path)
    write(index["weight_map"])
    (tmp_path / file).unlink()
    with pytest.raises(CheckpointError, match=f"{file} is missing"):
        read_headers(tmp_path)


def test_ours_with_a_missing_tensor_is_refused_before_loading(tmp_path):
    save_model(tmp_path, network(), processor())
    assert check_native(tmp_path) == torch.float32
    edit_tensors(lambda t: t.pop(NORM))(tmp_path)
    with pytest.raises(CheckpointError, match=f"{NORM} is missing"):
        convert(tmp_path, tmp_path / "new", "released")
    assert not (tmp_path / "new").exists()


def test_conversion_never_overwrites_and_needs_two_layouts(released, tmp_path):
    with pytest.raises(CheckpointError, match="not an empty directory"):
        convert(released, released, "native")
    with pytest.raises(CheckpointError, match="in the released layout already"):
        convert(released, tmp_path / "new", "released")
    with pytest.raises(CheckpointError, match="--to native"):
        load_model(released)
    shutil.rmtree(released)
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        convert(released, tmp_path / "new", "native")


def test_tensors_of_two_types_are_refused(tmp_path):
    model = network()
    model.mlp1.to(torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"mlp1\.0\.weight is torch\.bfloat16"):
        save_released(tmp_path / "new", model, processor())
    assert not (tmp_path / "new").exists()


def test_a_tower_with_rope_keeps_the_native_layout(tmp_path):
    model = network()
    model.config.vision_config.rope_2d = True
    with pytest.raises(CheckpointError, match=r"no word for vision_config\.rope_2d"):
        save_released(tmp_path / "new", model, processor())
    assert not (tmp_path / "new").exists()


def test_inspection_tells_parts_apart(released, tmp_path):
    found = inspect(released)
    assert (found.layout, found.dtypes, found.num_files) == ("released", ("torch.bfloat16",), 1)
    model = network()
    sizes = {part: sum(p.numel() for p in m.parameters()) for part, m in model.parts().items()}
    sizes["language"] += model.language_model.lm_head.weight.numel()  # stored though tied
    assert found.values == {**sizes, "other": 0}
    assert found.num_tensors == len(released_views(empty_model(model.config)))
    save_model(tmp_path / "ours", model, processor())
    ours = inspect(tmp_path / "ours")
    assert (ours.layout, ours.problem) == ("native", "")
    assert ours.config["text_config"]["hidden_size"] == 32
    assert "no config.json" in inspect(tmp_path).problem
