"""Experts: the balance loss means what it says, health is measured, calibration raises entropy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from model.calibration import CalibrationError, ExpertCalibrator, measure_multimodal, routers
from model.moe import RouterMeter, balance_loss, router_z_loss
from tests.model.tiny import network, pack, samples
from tests.ranks import on_ranks


def logits(num_tokens: int, seed: int = 0, experts: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, experts, generator=generator)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_uniform_routing_gives_the_coefficient(top_k):
    # Every token prefers another rotation of the experts: shares and probabilities are uniform.
    rotated = torch.stack([torch.roll(torch.arange(4.0), i) for i in range(4)]).repeat(5, 1)
    loss = balance_loss([rotated, rotated], top_k, coefficient=0.01)
    assert loss.item() == pytest.approx(0.01, rel=1e-5)


def test_one_expert_for_everything_gives_e_times_the_coefficient():
    everything = torch.tensor([[50.0, 0.0, 0.0, 0.0]]).repeat(6, 1)
    assert balance_loss([everything], 1, coefficient=0.01).item() == pytest.approx(0.04, rel=1e-5)


def test_padding_changes_nothing():
    real = [logits(10, 1), logits(10, 2)]
    padded = [torch.cat([x, 9 * logits(7, 3)]) for x in real]
    mask = torch.arange(17) < 10
    expected = balance_loss(real, 2)
    torch.testing.assert_close(balance_loss(padded, 2, mask), expected)


def test_it_equals_its_formula_per_layer():
    layers = [logits(12, 4), logits(12, 5)]
    total = 0.0
    for layer in layers:
        counts = [0.0] * 4
        for row in layer:
            for expert in row.topk(2).indices.tolist():
                counts[expert] += 1
        probs = layer.softmax(-1).mean(0).tolist()
        total += 4 * sum(c / 24 * p for c, p in zip(counts, probs, strict=True))
    assert balance_loss(layers, 2, coefficient=1.0).item() == pytest.approx(total / 2, rel=1e-5)


def test_gradient_pushes_probability_off_the_busy_expert():
    biased = (logits(50) + torch.tensor([2.0, 0.0, 0.0, 0.0])).requires_grad_()
    balance_loss([biased], 1).backward()
    assert biased.grad.sum(0)[0] > 0
    assert biased.grad.sum(0)[1:].sum() < 0


def test_model_loss_is_invariant_to_padding_and_packing():
    model = network(moe=True)
    encoded = samples()
    length = sum(len(e.input_ids) for e in encoded)
    losses = []
    with torch.no_grad():
        for room in (0, 30):
            ids, segments, labels, tiles = pack(encoded, length + room)
            out = model(ids, tiles, attention_mask=segments, labels=labels)
            losses.append(out.aux_loss)
            assert out.loss.item() == pytest.approx(
                (out.loss_per_token.mean() + out.aux_loss).item(), rel=1e-5
            )
            assert len(out.router_logits) == 2
    torch.testing.assert_close(losses[0], losses[1])


def test_dense_models_have_no_balance_loss():
    ids, segments, labels, tiles = pack(samples(), 160)
    out = network()(ids, tiles, attention_mask=segments, labels=labels)
    assert out.aux_loss is None
    assert out.router_logits is None


def test_z_loss_equals_its_formula_and_leaves_padding_out():
    layers = [logits(10, 1), logits(10, 2)]
    expected = sum(
        math.log(sum(math.exp(v) for v in row)) ** 2 for layer in layers for row in layer.tolist()
    )
    loss = router_z_loss(layers, coefficient=0.5)
    assert loss.item() == pytest.approx(0.5 * expected / 20, rel=1e-5)
    padded = [torch.cat([x, 9 * logits(7, 3)]) for x in layers]
    mask = torch.arange(17) < 10
    torch.testing.assert_close(router_z_loss(padded, mask, coefficient=0.5), loss)


def test_z_loss_is_an_option_of_the_model():
    model = network(moe=True)
    ids, segments, labels, tiles = pack(samples(), 160)
    inputs = {"pixel_values": tiles, "attention_mask": segments, "labels": labels}
    plain = model(ids, **inputs)
    model.config.router_z_loss_coef = 0.1
    both = model(ids, **inputs)
    z_loss = router_z_loss(plain.router_logits, segments.reshape(-1) != 0, 0.1)
    assert z_loss > 0
    torch.testing.assert_close(both.aux_loss, plain.aux_loss + z_loss)
    torch.testing.assert_close(both.loss, plain.loss + z_loss)


SPLITS = (6, 3, 16)  # of 16 tokens, the first rank's; of the last, the second rank has padding only
LOSSES = {"balance": lambda x, m, **k: balance_loss(x, 2, m, **k), "z": router_z_loss}


def losses_of_this_rank() -> dict[str, torch.Tensor]:
    """Its losses and gradients on its share of the 16 tokens, three more being padding."""
    results = {}
    rank = dist.get_rank()
    for split in SPLITS:
        share = logits(16, 7)[:split] if rank == 0 else logits(16, 7)[split:]
        mask = torch.arange(len(share) + 3) < len(share)
        for name, function in LOSSES.items():
            mine = torch.cat([share, 9 * logits(3, rank)]).requires_grad_()
            loss = function([mine], mask, coefficient=1.0, all_reduce=True)
            loss.backward()
            results[f"{name}.{split}.loss"] = loss.detach()
            results[f"{name}.{split}.gradient"] = mine.grad[: len(share)].clone()
    return results


@pytest.mark.slow
def test_global_losses_equal_the_joint_batch_however_it_is_split(tmp_path):
    local, remote = on_ranks(losses_of_this_rank, 2, tmp_path)
    for name, function in LOSSES.items():
        joint = logits(16, 7).requires_grad_()
        expected = function([joint], None, coefficient=1.0)
        expected.backward()
        for split in SPLITS:
            key = f"{name}.{split}"
            # Data-parallel training averages over ranks.
            mean = (local[f"{key}.loss"] + remote[f"{key}.loss"]) / 2
            torch.testing.assert_close(mean, expected.detach())
            gradient = torch.cat([local[f"{key}.gradient"], remote[f"{key}.gradient"]]) / 2
            torch.testing.assert_close(gradient, joint.grad)


def test_health_of_known_routing():
    meter = RouterMeter(top_k=1)
    one = torch.tensor([[9.0, 0, 0, 0]] * 4 + [[0, 9.0, 0, 0]] * 4)
    uniform = torch.eye(4).repeat(2, 1) * 9
    meter.add([one, uniform])
    meter.add([one, uniform], torch.tensor([True] * 4 + [False] * 4))
    health = meter.health()
    assert health.num_tokens == 12
    assert health.num_dead == (2, 0)
    shares = [8 / 12, 4 / 12]
    entropy = -sum(p * math.log(p) for p in shares) / math.log(4)
    assert health.entropy == pytest.approx((entropy, 1.0))
    assert health.load_max_over_mean == pytest.approx((8 / 3, 1.0))
    assert health.summary()["router_dead_experts"] == 2.0
    with pytest.raises(ValueError, match="no routed token"):
        RouterMeter(2).health()


def pictures() -> dict[str, Any]:
    """A packed row: text, one tile, several tiles, a video, padding."""
    ids, segments, labels, tiles = pack(samples(), 160)
    return {
        "input_ids": ids,
        "segment_ids": segments,
        "labels": labels,
        "images": {"pixel_values": tiles},
        "position_ids": None,
    }


def test_pictures_are_measured_as_the_model_sees_them():
    model = network(moe=True)
    batch = pictures()
    found = measure_multimodal(model, [batch, batch])
    once = model(
        batch["input_ids"],
        **batch["images"],
        attention_mask=batch["segment_ids"],
        labels=batch["labels"],
    )
    assert found.token_loss == pytest.approx(once.loss_per_token.mean().item(), rel=1e-5)
    real = batch["segment_ids"].reshape(-1) != 0
    meter = RouterMeter(2)
    meter.add(once.router_logits, real)
    assert found.health.entropy == pytest.approx(meter.health().entropy)
    assert found.health.num_tokens == 2 * int(real.sum())
    with pytest.raises(CalibrationError, match="no routers"):
        measure_multimodal(network(), [batch])


def test_calibration_raises_entropy_and_moves_routers_alone():
    model = network(moe=True)
    decoder = model.language_model
    with torch.no_grad():
        decoder.model.embed_tokens.weight[:, 0] += 10.0  # a direction that all tokens share
        for weight in routers(decoder):  # experts 0 and 1 take nearly everything
            weight.mul_(0.1)
            weight[:2, 0] += 1.0
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(6):
        ids = torch.randint(0, 250, (2, 32), generator=generator)
        segments = (torch.arange(32) // 12 + 1).repeat(2, 1)
        segments[:, 30:] = 0
        batches.append((ids, segments))
    calibrator = ExpertCalibrator(decoder)
    optimizer = torch.optim.Adam(calibrator.parameters, lr=0.01)
    names = {id(p): n for n, p in decoder.named_parameters()}
    frozen = {n: p.clone() for n, p in decoder.named_parameters() if "mlp.gate." not in n}
    before, pictures_before = calibrator.measure(batches), measure_multimodal(model, [pictures()])
    steps = []
    for batch in batches * 4:
        loss, step = calibrator.losses(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(step)
    after = calibrator.measure(batches)
    assert after.health.summary()["router_entropy"] > (
        1.2 * before.health.summary()["router_entropy"]
    )
    # Calibrated on text alone; tokens with pictures spread out as well (paper section 2.2).
    pictures_after = measure_multimodal(model, [pictures()])
    assert pictures_after.health.summary()["router_entropy"] > (
        pictures_before.health.summary()["router_entropy"] + 0.02
    )
    assert pictures_after.token_loss < pictures_before.token_loss + 0.1
    assert steps[-1].balance < steps[0].balance
    assert after.token_loss < before.token_loss + 0.1
    assert all(torch.equal(dict(decoder.named_parameters())[n], p) for n, p in frozen.items())
    assert {names[id(p)] for p in calibrator.parameters} == {
        f"model.layers.{i}.mlp.gate.weight" for i in range(2)
    }


def test_a_dense_model_cannot_be_calibrated():
    with pytest.raises(CalibrationError, match="no routers"):
        ExpertCalibrator(network().language_model)
