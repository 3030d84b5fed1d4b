"""Conversations and images in, token ids and pixels out."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from model.chat import (
    DEFAULT_SYSTEM_MESSAGE,
    END_OF_TEXT,
    IM_END,
    IM_START,
    IMAGE_PLACEHOLDER,
    IMG_CONTEXT,
    IMG_END,
    IMG_START,
    Message,
    Segment,
    count_images,
    segments,
)
from model.patches import MAX_PATCHES, to_patches
from model.tiling import tile_image, to_pixels
from model.tokenizer import CONTROL_TOKENS, load_tokenizer

PROCESSOR_FILE = "sailvl_processor.json"
_CONTROL = re.compile("|".join(re.escape(token) for token in CONTROL_TOKENS))


class ProcessorError(ValueError):
    """Messages and images that do not fit together, or a broken processor file."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One conversation, ready for the model.

    Attributes:
        input_ids: [T] int64.
        loss_mask: [T] bool, True on the tokens of assistant turns and their `<|im_end|>`.
        pixel_values: [num_tiles, 3, S, S] float32, in placeholder order; 0 tiles for text. With
            any resolution the patches [P, 3 * p * p] of all images (`model.patches`).
        image_grids: with any resolution, rows and columns of each image, [N, 2] int64; else None.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    pixel_values: np.ndarray
    image_grids: np.ndarray | None = None


class SailVLProcessor:
    """Chat format, tiling and tokenizer of one checkpoint.

    Args:
        tokenizer: with the released special tokens.
        image_size: side of a tile, pixels.
        patch_size: side of a patch, pixels.
        downsample: side of the merged square, patches.
        max_tiles: most tiles per image, thumbnail not counted (released preprocessor: 10).
        use_thumbnail: append the whole image as last tile when there are several.
        system_message: default system turn; "" for none.
        any_resolution: encode every image at its own size instead of in tiles (AnyRes); a video
            frame is still squeezed to one tile.
        max_patches: most patches of an image then.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int = 448,
        patch_size: int = 14,
        downsample: int = 2,
        max_tiles: int = 10,
        use_thumbnail: bool = True,
        system_message: str = DEFAULT_SYSTEM_MESSAGE,
        any_resolution: bool = False,
        max_patches: int = MAX_PATCHES,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.patch_size = patch_size
        self.downsample = downsample
        self.max_tiles = max_tiles
        self.use_thumbnail = use_thumbnail
        self.system_message = system_message
        self.any_resolution = any_resolution
        self.max_patches = max_patches
        self.tokens_per_tile = (image_size // patch_size // downsample) ** 2
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in CONTROL_TOKENS if token not in vocabulary]
        if missing:
            raise ProcessorError(
                f"the tokenizer lacks {missing[0]}; give it the visual tokens with "
                f"model.tokenizer.add_sail_tokens"
            )
        self._ids = {token: int(vocabulary[token]) for token in CONTROL_TOKENS}
        # The HF wrapper costs ten times the tokenisation itself on short strings.
        self._backend = tokenizer.backend_tokenizer

    @property
    def image_token_id(self) -> int:
        """Id of `<IMG_CONTEXT>`."""
        return self._ids[IMG_CONTEXT]

    @property
    def end_token_id(self) -> int:
        """Id of `<|im_end|>`, where generation stops."""
        return self._ids[IM_END]

    @property
    def pad_token_id(self) -> int:
        """Id of `<|endoftext|>`, the padding."""
        return self._ids[END_OF_TEXT]

    def never_generated(self, vocab_size: int) -> np.ndarray:
        """Ids that only the template may write, and rows of the embedding without a token.

        A placeholder in an answer would ask for pixels that do not exist when the answer is
        trained on or answered to.

        Args:
            vocab_size: rows of the model's embedding, at least the tokenizer's.

        Returns:
            [n] int64, ascending.
        """
        named = set(self.tokenizer.get_vocab().values())
        unnamed = set(range(vocab_size)) - named
        control = {token_id for token, token_id in self._ids.items() if token != IM_END}
        return np.array(sorted(control | unnamed), dtype=np.int64)

    def encode(
        self,
        messages: Sequence[Message],
        images: Sequence[Image.Image] = (),
        is_video: bool = False,
        add_generation_prompt: bool = False,
    ) -> Encoded:
        """Encode a conversation; see `Encoded`.

        Args:
            messages: chat turns; each image is one `<image>` in a user turn.
            images: RGB, in the order of the placeholders.
            is_video: the images are frames, one tile each.
            add_generation_prompt: end with an open assistant turn.

        Raises:
            ProcessorError: placeholders and images do not match in number.
            ChatError: see `chat.segments`.
        """
        turns = segments(messages, add_generation_prompt, self.system_message)
        expected = count_images(messages)
        if expected != len(images):
            raise ProcessorError(
                f"{expected} {IMAGE_PLACEHOLDER} placeholders in the user turns but "
                f"{len(images)} images; write one placeholder per image"
            )
        see = self._see_patches if self.any_resolution else self._see_tiles
        pixels, grids, num_tokens = see(images, is_video)
        ids: list[int] = []
        mask: list[bool] = []
        pending = iter(num_tokens)
        for turn in turns:
            self._append_turn(turn, pending, ids, mask)
        return Encoded(np.array(ids, dtype=np.int64), np.array(mask, dtype=bool), pixels, grids)

    def _see_tiles(
        self, images: Sequence[Image.Image], is_video: bool
    ) -> tuple[np.ndarray, None, list[int]]:
        """Tiles of all images, and the tokens of each image."""
        max_tiles = 1 if is_video else self.max_tiles
        tiles = [
            tile_image(image, self.image_size, max_tiles, self.use_thumbnail) for image in images
        ]
        flat = [tile for image_tiles in tiles for tile in image_tiles]
        shape = (0, 3, self.image_size, self.image_size)
        pixels = to_pixels(flat) if flat else np.zeros(shape, dtype=np.float32)
        return pixels, None, [len(image_tiles) * self.tokens_per_tile for image_tiles in tiles]

    def _see_patches(
        self, images: Sequence[Image.Image], is_video: bool
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Patches of all images, their grids, and the tokens of each image."""
        if is_video:
            images = [image.resize((self.image_size, self.image_size)) for image in images]
        seen = [
            to_patches(image, self.patch_size, self.downsample, self.max_patches)
            for image in images
        ]
        blank = np.zeros((0, 3 * self.patch_size**2), dtype=np.float32)
        pixels = np.concatenate([blank, *(patches for patches, _ in seen)])
        grids = np.array([grid for _, grid in seen], dtype=np.int64).reshape(-1, 2)
        return pixels, grids, [len(patches) // self.downsample**2 for patches, _ in seen]

    def _append_turn(self, turn: Segment, pending: Any, ids: list[int], mask: list[bool]) -> None:
        ids.append(self._ids[IM_START])
        mask.append(False)
        if turn.role == "assistant":
            # Header and content apart, exactly as they meet at generation time.
            header = self.encode_text(turn.header)
            content = self.encode_text(turn.content)
            ids += header + content
            mask += [False] * len(header) + [turn.trained] * len(content)
        else:
            content = self._encode_with_images(turn, pending)
            ids += content
            mask += [False] * len(content)
        if turn.closed:
            ids.append(self._ids[IM_END])
            mask.append(turn.trained)

    def _encode_with_images(self, turn: Segment, pending: Any) -> list[int]:
        text = turn.header + turn.content
        if turn.role != "user" or IMAGE_PLACEHOLDER not in text:
            return self.encode_text(text)
        first, *rest = text.split(IMAGE_PLACEHOLDER)
        ids = self.encode_text(first)
        for piece in rest:
            ids.append(self._ids[IMG_START])
            ids += [self._ids[IMG_CONTEXT]] * next(pending)
            ids.append(self._ids[IMG_END])
            ids += self.encode_text(piece)
        return ids

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text.

        Control tokens spelled in it stay text: a question that contains `<|im_end|>` cannot end
        its turn.
        """
        ids: list[int] = []
        start = 0
        for match in _CONTROL.finditer(text):
            cut = match.start() + 1  # after the "<": neither half is a control token
            ids += self._plain(text[start:cut])
            start = cut
        return ids + self._plain(text[start:])

    def _plain(self, text: str) -> list[int]:
        if not text:
            return []
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens up to `<|im_end|>`; boxes and think tags stay in."""
        stop = {self._ids[IM_END], self._ids[END_OF_TEXT]}
        kept: list[int] = []
        for token in token_ids:
            if token in stop:
                break
            kept.append(int(token))
        return str(self._backend.decode(kept, skip_special_tokens=False))

    def save(self, directory: str | Path) -> None:
        """Write tokenizer files and `sailvl_processor.json`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(directory)
        settings = {name: getattr(self, name) for name in _SETTINGS}
        text = json.dumps(settings, ensure_ascii=False, indent=2, sort_keys=True)
        (directory / PROCESSOR_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_recipe(cls, section: Any, tokenizer: PreTrainedTokenizerBase) -> SailVLProcessor:
        """The processor of a recipe's `model` section (read by attribute)."""
        return cls(
            tokenizer,
            image_size=section.vision.image_size,
            patch_size=section.vision.patch_size,
            downsample=section.downsample,
            max_tiles=section.max_tiles,
            use_thumbnail=section.use_thumbnail,
            system_message=section.system_message,
            any_resolution=section.any_resolution,
            max_patches=section.max_patches,
        )

    @classmethod
    def load(cls, directory: str | Path) -> SailVLProcessor:
        """Read what `save` wrote.

        Raises:
            ProcessorError: the directory holds no processor, or one with other fields.
        """
        path = Path(directory) / PROCESSOR_FILE
        if not path.is_file():
            raise ProcessorError(f"{directory} holds no {PROCESSOR_FILE}; is it a checkpoint?")
        settings = json.loads(path.read_text(encoding="utf-8"))
        if set(settings) != set(_SETTINGS):
            wrong = sorted(set(settings) ^ set(_SETTINGS))
            raise ProcessorError(f"{path}: field {wrong[0]!r} is missing or unknown")
        return cls(load_tokenizer(directory), **settings)


_SETTINGS = (
    "image_size",
    "patch_size",
    "downsample",
    "max_tiles",
    "use_thumbnail",
    "system_message",
    "any_resolution",
    "max_patches",
)
