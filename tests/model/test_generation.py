"""Generation: the cache equals a full forward, batches equal singles, seeds decide."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.decoding import Decoder
from model.generation import GenerationError, Prompt, generate, stream
from tests.model.tiny import image, network, processor

PICTURE = "<image>\nhow many circles are there?"


def prompts() -> list[Prompt]:
    frames = "Frame-1: <image>\nFrame-2: <image>\nis it red?"
    return [
        Prompt([{"role": "user", "content": "one"}]),
        Prompt([{"role": "user", "content": PICTURE}], [image(1)]),
        Prompt([{"role": "user", "content": PICTURE + " yes no" * 6}], [image(2, 120, 60)]),
        Prompt([{"role": "user", "content": frames}], [image(3, 90, 60), image(4)], is_video=True),
        Prompt([{"role": "user", "content": "is it red?"}]),
    ]


@pytest.mark.parametrize("moe", [False, True])
def test_a_cached_step_equals_a_full_forward(moe):
    model = network(moe)
    ids = torch.randint(0, 250, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, :1] = 0, 0
    with torch.inference_mode():
        decoder = Decoder(model.language_model, model.embed(ids, None), mask, 6, repeats=2)
        rows, row_mask = ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)
        for step in range(6):
            full = model(rows, attention_mask=row_mask, logits_to_keep=1).logits[:, 0]
            torch.testing.assert_close(decoder.logits, full, atol=1e-4, rtol=1e-4)
            tokens = (torch.arange(len(rows)) * 7 + step) % 250
            decoder.step(tokens)
            rows = torch.cat([rows, tokens[:, None]], dim=1)
            row_mask = torch.cat([row_mask, torch.ones_like(tokens)[:, None]], dim=1)
            if step == 2:  # finished rows leave
                kept = torch.tensor([1, 2, 5])
                decoder.keep(kept)
                rows, row_mask = rows[kept], row_mask[kept]


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batches_equal_singles(moe, temperature):
    model = network(moe)
    settings = {"max_new_tokens": 12, "temperature": temperature, "seed": 3}
    together = generate(model, processor(), prompts(), **settings)
    apart = generate(model, processor(), prompts(), batch_size=1, **settings)
    pairs = generate(model, processor(), prompts(), batch_size=2, **settings)
    assert [r[0].token_ids for r in together] == [r[0].token_ids for r in apart]
    assert [r[0].token_ids for r in together] == [r[0].token_ids for r in pairs]
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_allclose(one[0].logprobs, other[0].logprobs, atol=1e-4)


def test_seed_and_sample_index_decide():
    model = network()
    settings = {"max_new_tokens": 8, "temperature": 1.0}
    two = generate(model, processor(), prompts(), num_samples=2, seed=1, **settings)
    four = generate(model, processor(), prompts(), num_samples=4, seed=1, batch_size=4, **settings)
    other = generate(model, processor(), prompts(), num_samples=2, seed=2, **settings)
    assert [len(r) for r in four] == [4] * 5
    assert [[c.token_ids for c in r] for r in two] == [[c.token_ids for c in r[:2]] for r in four]
    assert [[c.token_ids for c in r] for r in two] != [[c.token_ids for c in r] for r in other]
    assert any(a.token_ids != b.token_ids for a, b in two)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_are_those_of_a_training_forward(temperature):
    model = network()
    for prompt, (completion,) in zip(
        prompts(),
        generate(model, processor(), prompts(), max_new_tokens=6, temperature=temperature),
        strict=True,
    ):
        encoded = processor().encode(*prompt, add_generation_prompt=True)
        ids = np.concatenate([encoded.input_ids, completion.token_ids])
        pixels = torch.from_numpy(encoded.pixel_values) if len(encoded.pixel_values) else None
        with torch.no_grad():
            logits = model(torch.from_numpy(ids)[None], pixels).logits[0]
        logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
        places = torch.arange(len(encoded.input_ids) - 1, len(ids) - 1)
        expected = logprobs[places, torch.tensor(completion.token_ids)]
        np.testing.assert_allclose(completion.logprobs, expected.numpy(), atol=1e-3)


def test_transformers_own_generate_agrees():
    model = network()
    prompt = prompts()[1]
    encoded = processor().encode(*prompt, add_generation_prompt=True)
    ids = torch.from_numpy(encoded.input_ids)[None]
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.from_numpy(encoded.pixel_values),
        max_new_tokens=8,
        do_sample=False,
        suppress_tokens=processor().never_generated(400).tolist(),
        eos_token_id=processor().end_token_id,
        pad_token_id=processor().pad_token_id,
    )
    (completion,) = generate(model, processor(), [prompt], max_new_tokens=8)[0]
    assert out[0, ids.shape[1] :].tolist() == completion.token_ids


def steered(token_at: dict[int, int], default: int):
    """A model whose answer is scripted: at given positions a given token, else the default."""
    model = network()
    decoder_norm, head = model.language_model.model.norm, model.language_model.lm_head
    vocab, position = head.weight.shape[0], {"next": 0}

    class Script(torch.nn.Module):
        def forward(self, hidden):
            logits = torch.zeros(*hidden.shape[:-1], vocab)
            logits[..., token_at.get(position["next"], default)] = 30.0
            position["next"] += 1
            return logits

    assert decoder_norm is not None
    model.language_model.lm_head = Script()
    return model


def test_stops_at_the_end_token():
    end = processor().end_token_id
    model = steered({3: end}, default=processor().encode_text("a")[0])
    (completion,) = generate(model, processor(), prompts()[:1], max_new_tokens=10)[0]
    assert completion.finished
    assert completion.text == "aaa"
    assert completion.token_ids[-1] == end
    assert len(completion.token_ids) == len(completion.logprobs) == 4


def test_out_of_tokens_is_not_finished():
    model = steered({}, default=processor().encode_text("a")[0])
    (completion,) = generate(model, processor(), prompts()[:1], max_new_tokens=5)[0]
    assert not completion.finished
    assert completion.text == "aaaaa"


def test_placeholders_and_nameless_ids_are_never_drawn():
    model = network()
    results = generate(
        model, processor(), prompts(), max_new_tokens=40, temperature=5.0, num_samples=8
    )
    never = set(processor().never_generated(400).tolist())
    drawn = {t for result in results for c in result for t in c.token_ids}
    assert processor().image_token_id in never
    assert not drawn & never
    assert len(drawn) > 100


def test_stream_pieces_join_to_the_same_answer():
    model = network()
    prompt = prompts()[1]
    settings = {"max_new_tokens": 30, "temperature": 1.0, "seed": 5}
    (expected,) = generate(model, processor(), [prompt], **settings)[0]
    pieces, completion = [], None
    answer = stream(model, processor(), *prompt[:2], **settings)
    while completion is None:
        try:
            pieces.append(next(answer))
        except StopIteration as stop:
            completion = stop.value
    assert completion.token_ids == expected.token_ids
    assert "".join(pieces) == completion.text
    assert len(pieces) > 3


def test_stream_holds_back_half_characters():
    tokens = processor().encode_text("a漢🙂b")
    script = dict(enumerate([*tokens, processor().end_token_id]))
    model = steered(script, default=0)
    pieces = list(stream(model, processor(), [{"role": "user", "content": "x"}], max_new_tokens=30))
    assert pieces == ["a", "漢", "🙂", "b"]


def test_generate_restores_the_mode():
    model = network().train()
    generate(model, processor(), prompts()[:1], max_new_tokens=2)
    assert model.training
    with pytest.raises(GenerationError, match=r"model\.eval"):
        next(stream(model, processor(), prompts()[0].messages, max_new_tokens=2))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1, "temperature": -1.0}, "negative"),
        ({"max_new_tokens": 1, "num_samples": 0}, "num_samples"),
    ],
)
def test_bad_parameters_are_named(settings, reason):
    with pytest.raises(GenerationError, match=reason):
        generate(network(), processor(), prompts()[:1], **settings)


def test_a_prompt_that_fills_the_context_is_refused():
    prompt = Prompt([{"role": "user", "content": "a " * 600}])
    with pytest.raises(GenerationError, match="leaves no room"):
        generate(network(), processor(), [prompt], max_new_tokens=4)
