"""Batched sampling and streaming.

A result depends on the model, the prompt, the seed and the prompt's index only: each row has its
own random numbers, drawn before it starts, so batch size and order do not matter (but for the
last bits of a matrix product, which differ with its shape).

Shape suffixes: B rows, T tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from model.batching import image_inputs
from model.chat import Message
from model.decoding import Decoder
from model.modeling import SailVLForConditionalGeneration
from model.processor import Encoded, SailVLProcessor

# Rows are dropped from the batch when this share of them is finished: a copy of the cache costs
# about as much as two steps.
COMPACT_AT = 0.25


class GenerationError(ValueError):
    """A prompt or sampling parameter that cannot be generated from."""


class Prompt(NamedTuple):
    """A conversation to answer; a plain (messages, images) pair does as well."""

    messages: Sequence[Message]
    images: Sequence[Image.Image] = ()
    is_video: bool = False


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer.

    Attributes:
        text: decoded answer without the closing token; `<think>` and `<box>` stay in.
        token_ids: sampled ids, the closing `<|im_end|>` included when there is one.
        logprobs: natural log of each token's probability under softmax(logits / temperature),
            under softmax(logits) when decoding is greedy.
        finished: the model closed its turn, rather than running out of tokens.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finished: bool


@torch.inference_mode()
def generate(
    model: SailVLForConditionalGeneration,
    processor: SailVLProcessor,
    conversations: Sequence[Prompt | tuple[Sequence[Message], Sequence[Image.Image]]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    num_samples: int = 1,
    first_index: int = 0,
) -> list[list[Completion]]:
    """Answer every conversation `num_samples` times.

    Args:
        conversations: prompts, each ending in a user turn.
        max_new_tokens: most tokens per answer, the closing one counted.
        temperature: 0 decodes greedily.
        seed: of the sampling; used together with prompt index and sample index.
        batch_size: most rows decoded at once (one prompt's samples are never split).
        num_samples: answers per prompt; the prompt itself is run once.
        first_index: prompt index of the first conversation, where others answer those before it.

    Returns:
        one list of `num_samples` completions per conversation, in order.

    Raises:
        GenerationError: parameters out of range, or a prompt that fills the whole context.
    """
    _check(max_new_tokens, temperature, num_samples, batch_size)
    prompts = [Prompt(*conversation) for conversation in conversations]
    encoded = [_encode(processor, prompt) for prompt in prompts]
    # Neighbours in length share a batch: less padding.
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i].input_ids), i))
    per_batch = max(1, batch_size // num_samples)
    results: list[list[Completion]] = [[] for _ in encoded]
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), per_batch):
            indices = order[start : start + per_batch]
            batch = [encoded[i] for i in indices]
            draws = [
                _uniforms(seed, first_index + i, j, max_new_tokens)
                for i in indices
                for j in range(num_samples)
            ]
            run = _Sampler(model, processor, batch, num_samples, max_new_tokens, temperature, draws)
            run.finish()
            for row, index in enumerate(i for i in indices for _ in range(num_samples)):
                results[index].append(run.completion(row))
    finally:
        model.train(was_training)
    return results


def stream(
    model: SailVLForConditionalGeneration,
    processor: SailVLProcessor,
    messages: Sequence[Message],
    images: Sequence[Image.Image] = (),
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    is_video: bool = False,
) -> Generator[str, None, Completion]:
    """Yield the answer in pieces as it is made; the generator's return value is the Completion.

    Pieces are whole characters and join to `Completion.text`. The same seed gives the same
    answer as `generate` with this prompt alone.

    Raises:
        GenerationError: as in `generate`.
    """
    _check(max_new_tokens, temperature, 1, 1)
    encoded = _encode(processor, Prompt(messages, images, is_video))
    draws = [_uniforms(seed, 0, 0, max_new_tokens)]
    if model.training:
        raise GenerationError("the model is in training mode; call model.eval() before streaming")
    with torch.inference_mode():
        run = _Sampler(model, processor, [encoded], 1, max_new_tokens, temperature, draws)
    waiting: list[int] = []
    while not run.done:
        with torch.inference_mode():  # not held while suspended: it belongs to the thread
            run.advance()
        token = run.tokens[0][-1]
        if token == processor.end_token_id:
            break
        waiting.append(token)
        piece = processor.decode(waiting)
        # U+FFFD at the end is a character whose other bytes are still to come (4 at most).
        if piece.endswith("\ufffd") and len(waiting) < 4:
            continue
        waiting = []
        if piece:
            yield piece
    if waiting and (piece := processor.decode(waiting)):
        yield piece
    return run.completion(0)


class _Sampler:
    """Rows of one batch being sampled; finished rows leave the decoder early."""

    def __init__(
        self,
        model: SailVLForConditionalGeneration,
        processor: SailVLProcessor,
        batch: Sequence[Encoded],
        repeats: int,
        max_new_tokens: int,
        temperature: float,
        draws: Sequence[np.ndarray],
    ) -> None:
        self.processor = processor
        self.temperature = temperature
        device = model.device
        input_ids, mask = _left_pad(batch, processor.pad_token_id)
        room = model.config.text_config.max_position_embeddings - input_ids.shape[1]
        if room < 1:
            raise GenerationError(
                f"a prompt of {input_ids.shape[1]} tokens leaves no room in a context of "
                f"{model.config.text_config.max_position_embeddings}; shorten it or use fewer tiles"
            )
        self.limit = min(max_new_tokens, room)
        vocab_size = model.config.text_config.vocab_size
        self.never = torch.from_numpy(processor.never_generated(vocab_size)).to(device)
        embeds = model.embed(input_ids.to(device), **image_inputs(batch, device))
        self.decoder = Decoder(
            model.language_model, embeds, mask.to(device), self.limit, repeats=repeats
        )
        num_rows = len(batch) * repeats
        self.draws = torch.from_numpy(np.stack(draws)).to(device)  # [rows, max_new_tokens]
        self.tokens: list[list[int]] = [[] for _ in range(num_rows)]
        self.logprobs: list[list[float]] = [[] for _ in range(num_rows)]
        self.rows = torch.arange(num_rows, device=device)  # of the decoder's batch, still open
        self.closed = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.num_steps = 0
        self._steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._pending: torch.Tensor | None = None

    @property
    def done(self) -> bool:
        """No row is left to sample."""
        return self.num_steps >= self.limit or bool(self.closed.all())

    def finish(self) -> None:
        """Sample until every row is closed or out of tokens."""
        while not self.done:
            self._sample()
            self._compact()
        self._flush()

    def advance(self) -> None:
        """Sample one token per row and record it at once (streaming)."""
        self._sample()
        self._flush()

    def _sample(self) -> None:
        if self._pending is not None:
            self.decoder.step(self._pending)
        uniforms = self.draws[self.rows, self.num_steps]
        tokens, logprobs = _draw(self.decoder.logits, self.never, self.temperature, uniforms)
        self._steps.append((self.rows, tokens, logprobs))
        self.closed = self.closed | (tokens == self.processor.end_token_id)
        self.num_steps += 1
        self._pending = tokens

    def _compact(self) -> None:
        num_closed = int(self.closed.sum())
        if 0 < num_closed < self.closed.numel() and num_closed >= COMPACT_AT * self.closed.numel():
            kept = (~self.closed).nonzero()[:, 0]
            self.decoder.keep(kept)
            self.rows = self.rows[kept]
            self._pending = self._pending[kept] if self._pending is not None else None
            self.closed = self.closed[kept]

    def _flush(self) -> None:
        """Tensors of the steps into lists per row; what follows a row's end is dropped."""
        end = self.processor.end_token_id
        for rows, tokens, logprobs in self._steps:
            for row, token, logprob in zip(
                rows.tolist(), tokens.tolist(), logprobs.tolist(), strict=True
            ):
                if not self.tokens[row] or self.tokens[row][-1] != end:
                    self.tokens[row].append(token)
                    self.logprobs[row].append(logprob)
        self._steps = []

    def completion(self, row: int) -> Completion:
        """What a row came to."""
        tokens = self.tokens[row]
        return Completion(
            text=self.processor.decode(tokens),
            token_ids=tokens,
            logprobs=self.logprobs[row],
            finished=bool(tokens) and tokens[-1] == self.processor.end_token_id,
        )


def _draw(
    logits_BV: torch.Tensor, never: torch.Tensor, temperature: float, uniform_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B] and their log probabilities [B]: greedy at 0, else by inverse cumulative sum.

    The ids of `never` cannot be drawn; log probabilities are those of the model all the same, as
    a training pass over the answer computes them.
    """
    logits = logits_BV.float()
    if temperature == 0.0:
        logprobs = torch.log_softmax(logits, dim=-1)
        tokens = logprobs.index_fill(1, never, float("-inf")).argmax(dim=-1)
    else:
        logprobs = torch.log_softmax(logits / temperature, dim=-1)
        probs = logprobs.double().exp().index_fill_(1, never, 0.0)
        cumulative = probs.cumsum(dim=-1)
        # Scaled to the sum reached, which is not quite 1.
        target = uniform_B[:, None].double() * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def _left_pad(batch: Sequence[Encoded], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, T] and mask [B, T] with padding on the left."""
    length = max(len(item.input_ids) for item in batch)
    ids = np.full((len(batch), length), pad_token_id, dtype=np.int64)
    mask = np.zeros((len(batch), length), dtype=np.int64)
    for row, item in enumerate(batch):
        ids[row, length - len(item.input_ids) :] = item.input_ids
        mask[row, length - len(item.input_ids) :] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _uniforms(seed: int, prompt: int, sample: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, prompt, sample]).random(count)


def _encode(processor: SailVLProcessor, prompt: Prompt) -> Encoded:
    return processor.encode(
        prompt.messages, prompt.images, is_video=prompt.is_video, add_generation_prompt=True
    )


def _check(max_new_tokens: int, temperature: float, num_samples: int, batch_size: int) -> None:
    if temperature < 0.0:
        raise GenerationError(f"temperature {temperature} is negative; 0 means greedy")
    for name, value in (
        ("max_new_tokens", max_new_tokens),
        ("num_samples", num_samples),
        ("batch_size", batch_size),
    ):
        if value < 1:
            raise GenerationError(f"{name} is {value}; it must be at least 1")
