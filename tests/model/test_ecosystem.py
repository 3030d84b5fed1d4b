"""What other software does with a checkpoint of ours: Auto classes, chat template, generate."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, TextIteratorStreamer

from model.chat import render, with_thinking
from model.checkpoint import save_model
from model.processor import ProcessorError, SailVLProcessor
from tests.model.tiny import image, network, processor, tokenizer

QUESTION = {"role": "user", "content": "<image>\nhow many circles are there?"}
ANSWER = {"role": "assistant", "content": "three"}
CONVERSATIONS = [
    [{"role": "user", "content": "one two three"}],
    [QUESTION, ANSWER, {"role": "user", "content": "is the red square left of it?"}],
    [{"role": "system", "content": "be short"}, QUESTION],
    [{"role": "user", "content": "Image-1: <image>\nImage-2: <image>\nyes no"}, ANSWER],
    [{"role": "user", "content": with_thinking("<image>\nhow many?")}],
]


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("system", ["", '你是 "X"\n{{ no }}'])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_the_template_renders_what_the_chat_format_says(conversation, system, prompt):
    made = processor(system_message=system).apply_chat_template(
        conversation, tokenize=False, add_generation_prompt=prompt
    )
    assert made == render(conversation, prompt, system_message=system)


def test_parts_of_a_turn_are_the_released_string():
    parts = [{"type": "image", "image": image(1)}, {"type": "text", "text": "how many?"}]
    made = processor().apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert made == "<|im_start|>user\n<image>\nhow many?<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "tool", "content": "x"}], "roles are"),
        ([QUESTION, {"role": "system", "content": "x"}], "may only come first"),
        ([{"role": "user", "content": [{"type": "video"}]}], "one a frame"),
    ],
)
def test_the_template_refuses_what_the_format_lacks(messages, reason):
    with pytest.raises(Exception, match=reason):
        processor().apply_chat_template(messages, tokenize=False)


def test_rendered_text_gives_the_tokens_of_the_conversation():
    made = processor()
    pictures = [[], [image(1)], [image(2, 120, 60)], [image(3), image(4)], [image(5)]]
    prompts = [render(conversation, system_message="") for conversation in CONVERSATIONS]
    batch = made(text=prompts, images=pictures, return_tensors="np")
    encoded = [
        made.encode(conversation, shown)
        for conversation, shown in zip(CONVERSATIONS, pictures, strict=True)
    ]
    for row, mask, item in zip(batch["input_ids"], batch["attention_mask"], encoded, strict=True):
        assert row[mask == 1].tolist() == item.input_ids.tolist()
        assert mask[-len(item.input_ids) :].all()
        assert not mask[: -len(item.input_ids)].any()
    pixels = np.concatenate([item.pixel_values for item in encoded])
    np.testing.assert_array_equal(batch["pixel_values"], pixels)


def test_a_conversation_with_its_images_becomes_tensors():
    parts = [{"type": "image", "image": image(1)}, {"type": "text", "text": "how many?"}]
    batch = processor().apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    expected = processor().encode(
        [{"role": "user", "content": "<image>\nhow many?"}], [image(1)], add_generation_prompt=True
    )
    assert batch["input_ids"][0].tolist() == expected.input_ids.tolist()
    np.testing.assert_array_equal(batch["pixel_values"].numpy(), expected.pixel_values)


def test_images_and_placeholders_must_match():
    with pytest.raises(ProcessorError, match="1 <image> placeholders in the text but 2 images"):
        processor()(text="<image>", images=[image(1), image(2)])
    with pytest.raises(TypeError, match="PIL image, got str"):
        processor()(text="<image>", images="https://example.org/cat.png")
    with pytest.raises(ProcessorError, match="videos as their frames"):
        processor()(text="<image>", videos=[image(1)])


FRESH = """
import json, sys
import model.processor, model.modeling  # registers the classes
from transformers import AutoModelForImageTextToText, AutoProcessor
from tests.model.tiny import image

directory, name = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(directory)
processor = AutoProcessor.from_pretrained(directory)
batch = processor(text=json.loads(name), images=[image(1), image(2, 120, 60)])
logits = model(**batch, logits_to_keep=1).logits[:, -1].tolist()
out = model.generate(**batch, max_new_tokens=6, do_sample=False)
print(json.dumps([logits, processor.batch_decode(out[:, batch["input_ids"].shape[1] :])]))
"""


@pytest.mark.parametrize("moe", [False, True])
def test_auto_classes_in_a_fresh_process_give_the_same(tmp_path, moe):
    model, made = network(moe), processor()
    save_model(tmp_path, model, made)
    prompts = [
        made.apply_chat_template(c, tokenize=False, add_generation_prompt=True)
        for c in (CONVERSATIONS[1], CONVERSATIONS[2], CONVERSATIONS[0])
    ]
    run = [sys.executable, "-c", FRESH, str(tmp_path), json.dumps(prompts)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    logits, text = json.loads(done.stdout.splitlines()[-1])
    batch = made(text=prompts, images=[image(1), image(2, 120, 60)])
    with torch.inference_mode():
        expected = model(**batch, logits_to_keep=1).logits[:, -1]
    torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-5, rtol=1e-5)
    out = model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert text == made.batch_decode(out[:, batch["input_ids"].shape[1] :])


def test_batches_of_unequal_length_generate_what_each_alone_does():
    model, made = network(), processor()
    pictures = [[image(1)], [], [image(2, 120, 60)]]
    prompts = [
        render(c, add_generation_prompt=True, system_message="")
        for c in (CONVERSATIONS[1], CONVERSATIONS[0], CONVERSATIONS[2])
    ]
    settings = {"max_new_tokens": 8, "do_sample": False}
    settings |= {"suppress_tokens": made.never_generated(400).tolist()}
    together = made(text=prompts, images=pictures)
    width = together["input_ids"].shape[1]
    out = model.generate(**together, **settings)[:, width:]
    for row, prompt, shown in zip(out, prompts, pictures, strict=True):
        alone = made(text=prompt, images=shown)
        single = model.generate(**alone, **settings)[0, alone["input_ids"].shape[1] :]
        assert row[: len(single)].tolist() == single.tolist()
        uncached = model.generate(**alone, **settings, use_cache=False)[0]
        assert uncached[alone["input_ids"].shape[1] :].tolist() == single.tolist()


@pytest.mark.parametrize("moe", [False, True])
def test_a_static_cache_generates_what_a_growing_one_does(moe):
    model, made = network(moe), processor()
    prompts = [render(c, True, system_message="") for c in (CONVERSATIONS[0], [QUESTION])]
    batch = made(text=prompts, images=[[], [image(1)]])
    settings = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True}
    growing = model.generate(**batch, **settings)
    static = model.generate(**batch, **settings, cache_implementation="static")
    assert static.tolist() == growing.tolist()


def test_generate_streams():
    model, made = network(), processor()
    batch = made(text=render([QUESTION], True, system_message=""), images=image(1))
    streamer = TextIteratorStreamer(made.tokenizer, skip_prompt=True)
    settings = {"max_new_tokens": 8, "do_sample": False}
    out = model.generate(**batch, **settings, streamer=streamer)
    assert "".join(streamer) == made.decode(out[0, batch["input_ids"].shape[1] :])


def test_save_pretrained_keeps_every_setting(tmp_path):
    made = SailVLProcessor(
        tokenizer(),
        image_size=56,
        max_tiles=3,
        use_thumbnail=False,
        system_message="你好",
        msac=True,
    )
    made.save_pretrained(tmp_path)
    found = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(found, SailVLProcessor)
    body = json.loads((tmp_path / "processor_config.json").read_text())
    assert {name: getattr(found, name) for name in body if name != "processor_class"} == {
        name: value for name, value in body.items() if name != "processor_class"
    }
    assert body["msac"] is True
    assert found.chat_template == made.chat_template
