"""Losses made block by block are the plain ones, and no block holds more logits than it may."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model import output_layer
from model.output_layer import token_losses
from tests.model.tiny import network, pack, samples

NUM_LABELS, WIDTH, VOCAB = 50, 8, 96


class LargestTensor(TorchDispatchMode):
    """The most values that any tensor held which an operation made, backward pass included."""

    num_values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, torch.Tensor):
                self.num_values = max(self.num_values, made.numel())
        return out


def case(dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(WIDTH, VOCAB, bias=False).to(dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(VOCAB, WIDTH, generator=generator))
    hidden = torch.randn(NUM_LABELS, WIDTH, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (NUM_LABELS,), generator=generator)
    weights = torch.rand(NUM_LABELS, generator=generator)  # as turns of unequal length have
    return linear, hidden, targets, weights


@pytest.mark.parametrize("rows", [1, 7, 25, 49, 50, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_blocks_give_the_plain_losses_and_gradients(monkeypatch, rows, temperature):
    monkeypatch.setattr(output_layer, "LOGITS_AT_ONCE", rows * VOCAB + VOCAB - 1)
    linear, hidden, targets, weights = case()
    expected = F.cross_entropy(linear(hidden) / temperature, targets, reduction="none")
    wanted = torch.autograd.grad((expected * weights).sum(), (hidden, linear.weight))
    losses = token_losses(linear, hidden, targets, temperature)
    found = torch.autograd.grad((losses * weights).sum(), (hidden, linear.weight))
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(found, wanted)


def test_no_more_logits_exist_at_a_time_than_allowed(monkeypatch):
    held = {}
    for rows in (5, NUM_LABELS):
        monkeypatch.setattr(output_layer, "LOGITS_AT_ONCE", rows * VOCAB)
        linear, hidden, targets, weights = case(torch.bfloat16)
        with LargestTensor() as largest:
            (token_losses(linear, hidden, targets) * weights).sum().backward()
        held[rows] = largest.num_values
    assert held == {5: VOCAB * WIDTH, NUM_LABELS: NUM_LABELS * VOCAB}  # a weight's size, and logits


def test_it_is_still_a_linear_layer_of_the_same_name_and_weights():
    linear, hidden, targets, _ = case()
    plain, state = linear(hidden), linear.state_dict()
    token_losses(linear, hidden, targets)
    assert isinstance(linear, torch.nn.Linear)
    assert torch.equal(linear(hidden), plain)
    assert all(torch.equal(state[name], value) for name, value in linear.state_dict().items())
    assert token_losses(linear, hidden[:0], targets[:0]).shape == (0,)


@pytest.mark.parametrize("moe", [False, True])
def test_a_training_step_is_the_same_in_blocks(monkeypatch, moe):
    ids, segments, labels, tiles = pack(samples(), 160)
    gradients = []
    for at_once in (output_layer.LOGITS_AT_ONCE, 2 * 400):  # whole, and two tokens at a time
        monkeypatch.setattr(output_layer, "LOGITS_AT_ONCE", at_once)
        model = network(moe).train()
        out = model(ids, tiles, attention_mask=segments, labels=labels)
        out.loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert (labels != -100).sum() > 2
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)
