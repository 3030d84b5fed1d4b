"""A real, very small model that has learned a few replies by heart, behind a real server."""

from __future__ import annotations

import base64
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from openai import OpenAI
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3Config

from model.chat import with_thinking
from model.checkpoint import build_model, save_model
from model.config import SailViTConfig
from model.modeling import SailVLForConditionalGeneration
from model.processor import SailVLProcessor
from model.tokenizer import train_tokenizer
from sailyard.media import encode_png
from serving.app import create_app
from serving.load import load_served
from serving.settings import ServingSettings
from serving.versions import Versions, Wanted

RED, BLUE = Image.new("RGB", (28, 28), "red"), Image.new("RGB", (28, 28), "blue")
THOUGHT = "<think>5 and 7 make 12</think>\n\\boxed{12}"
CONTEXT = 512

# Waits long enough for a model to be loaded. Servers come and go, so it keeps no connection.
http = httpx.Client(timeout=180, limits=httpx.Limits(max_keepalive_connections=0))


def wait_until(true: Callable[[], object], told: str) -> None:
    """Return once it is so. Args: told: What has gone wrong if that takes minutes."""
    until = time.monotonic() + 180
    while not true():
        assert time.monotonic() < until, told
        time.sleep(0.02)


def lessons(greeting: str) -> list[tuple[list[dict[str, str]], list[Image.Image], str]]:
    """What a version knows: turns, images, reply."""
    colour = "<image>\nWhich colour?"
    return [
        ([{"role": "user", "content": "hello"}], [], greeting),
        ([{"role": "user", "content": colour}], [RED], "red"),
        ([{"role": "user", "content": colour}], [BLUE], "blue"),
        ([{"role": "user", "content": with_thinking("5 + 7?")}], [], THOUGHT),
        ([{"role": "user", "content": "5 + 7?"}], [], "12"),
        ([{"role": "user", "content": "count"}], [], " ".join(str(n) for n in range(40))),
    ]


def build(greetings: list[str]) -> tuple[SailVLForConditionalGeneration, SailVLProcessor]:
    """A random model whose tokenizer knows the words."""
    data = [lesson for greeting in greetings for lesson in lessons(greeting)]
    texts = [turn["content"] for turns, _, _ in data for turn in turns] + [r for _, _, r in data]
    tokenizer = train_tokenizer(texts * 20, 420)
    processor = SailVLProcessor(
        tokenizer, image_size=28, patch_size=14, max_tiles=2, system_message=""
    )
    vision = SailViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    language = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )
    return build_model(vision, language, image_token_id=processor.image_token_id), processor


def learn_by_heart(
    model: SailVLForConditionalGeneration, processor: SailVLProcessor, greeting: str
) -> None:
    """Train until `lessons(greeting)` come word for word under greedy decoding."""
    rows, pixels = [], []
    for turns, images, reply in lessons(greeting):
        row = processor.encode([*turns, {"role": "assistant", "content": reply}], images)
        labels = torch.from_numpy(row.input_ids).masked_fill(~torch.from_numpy(row.loss_mask), -100)
        rows.append((torch.from_numpy(row.input_ids), labels))
        pixels.append(torch.from_numpy(row.pixel_values))
    ids = pad_sequence([r[0] for r in rows], batch_first=True, padding_value=processor.pad_token_id)
    labels = pad_sequence([r[1] for r in rows], batch_first=True, padding_value=-100)
    mask = pad_sequence([torch.ones_like(r[0]) for r in rows], batch_first=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(400):
        logits = model(input_ids=ids, pixel_values=torch.cat(pixels), attention_mask=mask).logits
        losses = cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        if losses.max() < 0.1:
            return
        losses[labels[:, 1:] != -100].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError(f"the fixture's model did not learn its replies: {losses.max()}")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two versions that differ in how they greet."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("checkpoints")
    names = ("first", "second")
    model, processor = build([f"I am {name}." for name in names])
    for name in names:
        learn_by_heart(model.train(), processor, f"I am {name}.")
        save_model(root / name, model.eval(), processor)
    return {name: root / name for name in names}


class Yard:
    """A registry of one alias, as the server sees it."""

    def __init__(self, checkpoints: dict[str, Path], promoted: str | None) -> None:
        self.checkpoints, self.promoted = dict(checkpoints), promoted

    def look_up(self) -> Wanted | None:
        if self.promoted is None:
            return None
        path = self.checkpoints[self.promoted]
        return Wanted(self.promoted, f"digest-{self.promoted}", lambda: path)


@contextmanager
def serve(
    yard: Yard, prove: Callable[[object], None] | None = None, **options: object
) -> Iterator[tuple[str, Versions]]:
    """A real uvicorn on a free loopback port; yields its address."""
    settings = ServingSettings(**{"poll_seconds": 60.0, **options})
    versions = Versions(
        yard.look_up, lambda wanted: load_served(wanted, settings), "nothing is promoted", prove
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(create_app(settings, versions), log_level="warning")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        loaded = yard.promoted is None
        wait_until(
            lambda: server.started and (loaded or versions.current), "the server did not come up"
        )
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", versions
        finally:
            server.should_exit = True
            thread.join(180)
            assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def address(checkpoints: dict[str, Path]) -> Iterator[str]:
    """A server for tests that change nothing."""
    with serve(Yard(checkpoints, "first"), max_body_bytes=2**20, max_pixels=10**6) as (url, _):
        yield url


@pytest.fixture(scope="session")
def make_client() -> Callable[[str], OpenAI]:
    return lambda url: OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=180)


@pytest.fixture(scope="session")
def client(address: str, make_client: Callable[[str], OpenAI]) -> OpenAI:
    return make_client(address)


def data_url(image: Image.Image | bytes) -> str:
    data = image if isinstance(image, bytes) else encode_png(image)
    return "data:image/png;base64," + base64.b64encode(data).decode()
