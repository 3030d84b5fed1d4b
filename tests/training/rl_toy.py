"""A toy policy and task for reinforcement: which colour goes with which thing?

The policy starts out answering with any of four colours, the right one half of the time;
only the reward says which one that is.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3MoeConfig

from model.chat import with_thinking
from model.checkpoint import build_model, save_model
from model.config import SailViTConfig
from model.modeling import SailVLForConditionalGeneration
from model.processor import SailVLProcessor
from model.tokenizer import train_tokenizer
from sailyard.samples import Sample, write_samples
from training.packing import collate_rows

THINGS = ("grass", "sky", "snow", "rose", "leaf", "sea", "milk", "blood")
COLOURS = ("green", "blue", "white", "red")
TRUTH = dict(zip(THINGS, itertools.cycle(COLOURS), strict=False))
IMAGE_SIZE = 28


def question(thing: str) -> str:
    return f"What colour is {thing}?"


def build_policy(moe: bool = False) -> tuple[SailVLForConditionalGeneration, SailVLProcessor]:
    """A network of random weights that is small enough for tests, and its processor."""
    texts = [f"{question(thing)} {colour}" for thing in THINGS for colour in COLOURS]
    tokenizer = train_tokenizer([*texts, with_thinking("")] * 4, 384)
    shape = {
        "vocab_size": 384,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    language = Qwen3MoeConfig(**shape, **experts) if moe else Qwen3Config(**shape)
    vision = SailViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=7,
    )
    processor = SailVLProcessor(
        tokenizer, image_size=IMAGE_SIZE, patch_size=7, max_tiles=1, system_message=""
    )
    model = build_model(vision, language, image_token_id=processor.image_token_id)
    return model, processor


def save_guessing_policy(directory: Path, steps: int = 180, moe: bool = False) -> None:
    """Train the policy to be right every other time, and save it as a checkpoint."""
    torch.manual_seed(0)
    model, processor = build_policy(moe)
    encoded = [
        processor.encode(
            [{"role": "user", "content": question(t)}, {"role": "assistant", "content": c}]
        )
        for t in THINGS
        for c in (*COLOURS, TRUTH[t], TRUTH[t])
    ]
    batch = collate_rows([[e] for e in encoded], max(len(e.input_ids) for e in encoded))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(steps):
        loss = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["segment_ids"],
            labels=batch["labels"],
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(directory, model, processor)


def write_prompts(directory: Path, num_prompts: int = 48, num_thinking: int = 0) -> None:
    """Prompts as an RL set holds them; the last `num_thinking` ask for thought."""
    samples = []
    for number in range(num_prompts):
        thing = THINGS[number % len(THINGS)]
        think = number >= num_prompts - num_thinking
        text = with_thinking(question(thing)) if think else question(thing)
        samples.append(
            Sample(
                id=f"prompt-{number}",
                source="text",
                task="colour",
                messages=[{"role": "user", "content": text}],
                meta={
                    "answer": TRUTH[thing],
                    "check": "exact",
                    "skill": "colour",
                    "think": think,
                    "scene": {"kind": "text"},
                },
            )
        )
    write_samples(directory, samples)
