"""Experts back ends give one result, ours on every device and size, and each can be asked for."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from model.checkpoint import build_language, load_language, save_language, save_model
from model.experts import BACKEND, BACKENDS, OVERRIDE, choose_experts
from tests.model.experts_case import assert_same, make_case
from tests.model.tiny import language_config, network, pack, processor, samples, tokenizer


@pytest.mark.parametrize("backend", ["grouped_mm", BACKEND])
@pytest.mark.parametrize("top_k", range(1, 9))
@pytest.mark.parametrize("idle", [0, 4])
def test_back_ends_agree_forward_and_backward(backend, top_k, idle):
    case = make_case(37, 20, 12, 12, top_k, idle=idle)
    assert_same(case.run(backend), case.run("eager"), 1e-6)


@pytest.mark.parametrize("shape", [(1, 7, 3, 4, 2), (5, 33, 17, 5, 5), (3, 1, 1, 2, 1)])
def test_ours_takes_any_size(shape):  # grouped_mm wants rows of a multiple of 16 bytes
    case = make_case(*shape)
    assert_same(case.run(BACKEND), case.run("eager"), 1e-6)


def test_in_bfloat16_ours_is_as_near_to_the_truth_as_eager():
    half = make_case(64, 64, 32, 8, 2, dtype=torch.bfloat16)
    exact = make_case(64, 64, 32, 8, 2)
    exact.experts.load_state_dict(half.experts.state_dict())
    exact.tokens, exact.weights, exact.grad = (
        x.float() for x in (half.tokens, half.weights, half.grad)
    )
    truth = exact.run("eager")
    assert_same(half.run(BACKEND), truth, 1e-2)
    assert_same(half.run("eager"), truth, 1e-2)


def test_gradients_are_those_of_finite_differences():
    case = make_case(6, 5, 3, 4, 2, dtype=torch.float64)
    case.experts.config._experts_implementation = BACKEND
    names = ("gate_up_proj", "down_proj")

    def layer(tokens, weights, *parameters):
        named = dict(zip(names, parameters, strict=True))
        inputs = (tokens, case.index, weights)
        return torch.func.functional_call(case.experts, named, inputs)

    inputs = [case.tokens, case.weights, *(getattr(case.experts, name) for name in names)]
    assert torch.autograd.gradcheck(layer, [x.detach().requires_grad_() for x in inputs])


def test_gradient_without_strides_and_no_tokens_at_all():
    case = make_case(9, 8, 4, 4, 2)
    case.grad = torch.ones(1, 1).expand(9, 8)
    assert_same(case.run(BACKEND), case.run("eager"), 1e-6)
    case = make_case(0, 8, 4, 4, 2)
    for result in case.run(BACKEND).values():
        assert result.count_nonzero() == 0


def test_autocast_is_followed():
    case = make_case(32, 16, 8, 4, 2)
    results = {}
    for backend in ("eager", BACKEND):
        with torch.autocast("cpu", torch.bfloat16):
            results[backend] = case.run(backend)
    assert results[BACKEND]["output"].dtype == torch.float32
    assert results[BACKEND]["gate and up"].dtype == torch.float32
    assert_same(results[BACKEND], results["eager"], 2e-2)
    full = case.run(BACKEND)["output"]
    assert not torch.equal(results[BACKEND]["output"], full)  # the products were in bfloat16


def test_frozen_experts_cost_no_gradient_and_pass_one_on(monkeypatch):
    case = make_case(16, 12, 8, 4, 2)
    wanted = case.run("eager")
    case.experts.requires_grad_(False)
    monkeypatch.setattr("model.experts_torch.grad_weight", None)  # not to be called
    case.experts.config._experts_implementation = BACKEND
    case.experts.zero_grad(set_to_none=True)
    tokens, weights = case.tokens.clone().requires_grad_(), case.weights.clone().requires_grad_()
    case.experts(tokens, case.index, weights).backward(case.grad)
    assert case.experts.gate_up_proj.grad is None
    torch.testing.assert_close(tokens.grad, wanted["tokens"])
    torch.testing.assert_close(weights.grad, wanted["router weights"])


def test_experts_of_another_form_are_refused():
    config = Qwen3MoeConfig(
        hidden_size=8, moe_intermediate_size=4, num_experts=4, hidden_act="gelu"
    )
    config._experts_implementation = BACKEND
    index = torch.zeros(2, 1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"activation 'gelu'.*grouped_mm"):
        Qwen3MoeExperts(config)(torch.randn(2, 8), index, torch.ones(2, 1))


def test_the_choice_follows_machine_environment_and_argument(monkeypatch):
    monkeypatch.delenv(OVERRIDE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_experts() == "grouped_mm"
    monkeypatch.setenv(OVERRIDE, "eager")
    assert choose_experts() == "eager"
    assert choose_experts(BACKEND) == BACKEND
    monkeypatch.setenv(OVERRIDE, "gruoped_mm")
    with pytest.raises(ValueError, match=r"gruoped_mm.*SAILYARD_EXPERTS.*eager, grouped_mm"):
        choose_experts()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_loader_takes_the_chosen_back_end(monkeypatch, tmp_path, backend):
    monkeypatch.setenv(OVERRIDE, backend)
    model = network(moe=True)
    save_model(tmp_path / "model", model, processor())
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    language = build_language(language_config(moe=True))
    save_language(tmp_path / "language", language, tokenizer())
    decoders = [model.language_model, loaded.language_model, language]
    decoders.append(load_language(tmp_path / "language")[0])
    assert {decoder.config._experts_implementation for decoder in decoders} == {backend}


def test_transformers_setting_wins_and_the_model_stays_the_same(tmp_path):
    model = network(moe=True)
    save_model(tmp_path, model, processor())
    ids, segments, labels, tiles = pack(samples(), 160)
    losses = {}
    for backend in BACKENDS:
        model = AutoModelForImageTextToText.from_pretrained(
            tmp_path, experts_implementation=backend, attn_implementation="sdpa"
        )
        assert model.language_model.config._experts_implementation == backend
        out = model(ids, tiles, attention_mask=segments, labels=labels)
        losses[backend] = out.loss.item()
        model.set_experts_implementation("eager")
        assert model.language_model.config._experts_implementation == "eager"
    assert losses[BACKEND] == pytest.approx(losses["eager"], rel=1e-5)
    assert losses["grouped_mm"] == pytest.approx(losses["eager"], rel=1e-5)
