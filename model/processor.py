"""Conversations and images in, token ids and pixels out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

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
from model.config import SailVLConfig
from model.images import (
    SeenImages,
    flatten_images,
    plan_patches,
    plan_tiles,
    see_patches,
    see_tiles,
)
from model.patches import MAX_PATCHES
from model.template import chat_template
from model.tokenizer import CONTROL_TOKENS, load_tokenizer

PROCESSOR_FILE = "processor_config.json"
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


class SailVLProcessor(ProcessorMixin):
    """Chat format, tiling and tokenizer of one checkpoint.

    `encode` is for our own rooms: one conversation, with its loss mask; what a user writes cannot
    become a control token. Calling it, and `apply_chat_template`, is for the ecosystem: rendered
    text, batches padded on the left.

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
        msac: tile a single image a second time with another grid (`tiling.tile_image`); used by
            the authors' evaluation, off in the released processor.
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
        msac: bool = False,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template(system_message))
        self.image_size = image_size
        self.patch_size = patch_size
        self.downsample = downsample
        self.max_tiles = max_tiles
        self.use_thumbnail = use_thumbnail
        self.system_message = system_message
        self.any_resolution = any_resolution
        self.max_patches = max_patches
        self.msac = msac
        if any_resolution and msac:
            raise ProcessorError("msac cuts tiles, any_resolution cuts none; choose one")
        self.tokens_per_tile = (image_size // patch_size // downsample) ** 2
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in CONTROL_TOKENS if token not in vocabulary]
        if missing:
            raise ProcessorError(
                f"the tokenizer lacks {missing[0]}; give it the visual tokens with "
                f"model.tokenizer.add_sail_tokens"
            )
        self._ids = {token: int(vocabulary[token]) for token in CONTROL_TOKENS}

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
        max_tiles: int | None = None,
    ) -> Encoded:
        """Encode a conversation; see `Encoded`.

        Args:
            messages: chat turns; each image is one `<image>` in a user turn.
            images: RGB, in the order of the placeholders.
            is_video: the images are frames, one tile each.
            add_generation_prompt: end with an open assistant turn.
            max_tiles: instead of the processor's own (`tiling.tile_budget`).

        Raises:
            ProcessorError: placeholders and images do not match in number.
            ChatError: see `chat.segments`.
        """
        sizes = [image.size for image in images]
        planned = self.lay_out(messages, sizes, is_video, add_generation_prompt, max_tiles)
        return replace(planned, pixel_values=self.see(images, is_video, max_tiles))

    def lay_out(
        self,
        messages: Sequence[Message],
        sizes: Sequence[tuple[int, int]],
        is_video: bool = False,
        add_generation_prompt: bool = False,
        max_tiles: int | None = None,
    ) -> Encoded:
        """As `encode` for images of these widths and heights, with `images.unseen` pixels."""
        turns = segments(messages, add_generation_prompt, self.system_message)
        expected = count_images(messages)
        if expected != len(sizes):
            raise ProcessorError(
                f"{expected} {IMAGE_PLACEHOLDER} placeholders in the user turns but "
                f"{len(sizes)} images; write one placeholder per image"
            )
        seen = self._plan(sizes, is_video, max_tiles)
        ids: list[int] = []
        mask: list[bool] = []
        pending = iter(seen.num_tokens)
        for turn in turns:
            self._append_turn(turn, pending, ids, mask)
        return Encoded(
            input_ids=np.array(ids, dtype=np.int64),
            loss_mask=np.array(mask, dtype=bool),
            pixel_values=seen.pixel_values,
            image_grids=seen.image_grids,
        )

    def see(
        self, images: Sequence[Image.Image], is_video: bool = False, max_tiles: int | None = None
    ) -> np.ndarray:
        """`pixel_values` of a conversation's images, as `encode` gives them."""
        return self._see(images, is_video, max_tiles).pixel_values

    def _plan(
        self, sizes: Sequence[tuple[int, int]], is_video: bool, max_tiles: int | None
    ) -> SeenImages:
        size = self.image_size
        if self.any_resolution:
            shown = [(size, size)] * len(sizes) if is_video else sizes
            return plan_patches(shown, self.patch_size, self.downsample, self.max_patches)
        most = 1 if is_video else max_tiles or self.max_tiles
        msac = self.msac and len(sizes) == 1
        return plan_tiles(sizes, size, self.tokens_per_tile, most, self.use_thumbnail, msac)

    def _see(
        self, images: Sequence[Image.Image], is_video: bool, max_tiles: int | None
    ) -> SeenImages:
        size = self.image_size
        if self.any_resolution:
            shown = [image.resize((size, size)) for image in images] if is_video else images
            return see_patches(shown, self.patch_size, self.downsample, self.max_patches)
        most = 1 if is_video else max_tiles or self.max_tiles
        msac = self.msac and len(images) == 1
        return see_tiles(images, size, self.tokens_per_tile, most, self.use_thumbnail, msac)

    def _append_turn(
        self, turn: Segment, pending: Iterator[int], ids: list[int], mask: list[bool]
    ) -> None:
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

    def _encode_with_images(self, turn: Segment, pending: Iterator[int]) -> list[int]:
        text = turn.header + turn.content
        if turn.role != "user" or IMAGE_PLACEHOLDER not in text:
            return self.encode_text(text)
        first, *rest = text.split(IMAGE_PLACEHOLDER)
        ids = self.encode_text(first)
        for piece in rest:
            ids += self._placeholder(next(pending)) + self.encode_text(piece)
        return ids

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: None = None,
        audio: None = None,
        *,
        is_video: bool = False,
        max_tiles: int | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Rendered prompts and their images, ready for `generate`.

        Args:
            images: one image, a list, or a list for each prompt; in the order of the placeholders.
            text: prompts as the chat template renders them, each image one `<image>`. Control
                tokens in it are obeyed; use `encode` for text that is not trusted.
            videos, audio: not taken; a video is given as its frames, one image each.
            is_video: the images are frames, one tile each.
            max_tiles: instead of the processor's own.
            return_tensors: "pt" or "np".

        Returns:
            `input_ids` and `attention_mask` [B, T], padded on the left; with images also
            `pixel_values`, and `image_grids` with any resolution, as in `Encoded`.

        Raises:
            ProcessorError: no text, something that is neither text nor image, or placeholders and
                images that do not match in number.
        """
        if text is None or videos is not None or audio is not None:
            raise ProcessorError("give text, and videos as their frames; audio is not understood")
        prompts = [text] if isinstance(text, str) else list(text)
        shown = flatten_images(images)
        expected = sum(prompt.count(IMAGE_PLACEHOLDER) for prompt in prompts)
        if expected != len(shown):
            raise ProcessorError(
                f"{expected} {IMAGE_PLACEHOLDER} placeholders in the text but {len(shown)} images; "
                f"write one placeholder per image"
            )
        seen = self._see(shown, is_video, max_tiles)
        pending = iter(seen.num_tokens)
        rows = [self._expand(prompt, pending) for prompt in prompts]
        length = max(map(len, rows))
        ids = np.array([[self.pad_token_id] * (length - len(row)) + row for row in rows])
        mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        data = {"input_ids": ids, "attention_mask": mask}
        if shown:
            data["pixel_values"] = seen.pixel_values
            data |= {} if seen.image_grids is None else {"image_grids": seen.image_grids}
        return BatchFeature(data, tensor_type=return_tensors)

    def _expand(self, prompt: str, pending: Iterator[int]) -> list[int]:
        first, *rest = prompt.split(IMAGE_PLACEHOLDER)
        ids = self._plain(first)
        for piece in rest:
            ids += self._placeholder(next(pending)) + self._plain(piece)
        return ids

    def _placeholder(self, num_tokens: int) -> list[int]:
        """`<img>`, the slots of one image's visual tokens, `</img>`."""
        slots = [self._ids[IMG_CONTEXT]] * num_tokens
        return [self._ids[IMG_START], *slots, self._ids[IMG_END]]

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
        # The wrapper around it costs ten times the tokenisation itself on short strings.
        return list(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens up to `<|im_end|>`; boxes and think tags stay in."""
        stop = {self._ids[IM_END], self._ids[END_OF_TEXT]}
        kept: list[int] = []
        for token in token_ids:
            if token in stop:
                break
            kept.append(int(token))
        return str(self.tokenizer.backend_tokenizer.decode(kept, skip_special_tokens=False))

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
    def from_pretrained(cls, directory: str | Path, **kwargs: Any) -> SailVLProcessor:  # type: ignore[override]
        """Read what `save_pretrained` wrote, or a Hugging Face id.

        Raises:
            ProcessorError: the directory holds no processor, or one with other fields.
            TokenizerError: it holds no tokenizer, or a foreign one.
        """
        if Path(directory).is_dir() and not (Path(directory) / PROCESSOR_FILE).is_file():
            raise ProcessorError(f"{directory} holds no {PROCESSOR_FILE}; is it a checkpoint?")
        return super().from_pretrained(directory, **kwargs)

    @classmethod
    def from_args_and_dict(
        cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any
    ) -> SailVLProcessor:
        """Called by `from_pretrained`; a field too few or too many would pass unnoticed there."""
        wrong = (set(processor_dict) - _NOT_SETTINGS) ^ set(_SETTINGS)
        if wrong:
            raise ProcessorError(
                f"{PROCESSOR_FILE}: field {min(wrong)!r} is missing or unknown; its fields are "
                f"{', '.join(_SETTINGS)}"
            )
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    @classmethod
    def _load_tokenizer_from_pretrained(
        cls, kind: str, directory: str | Path, **kwargs: Any
    ) -> PreTrainedTokenizerBase:
        return load_tokenizer(directory)


_SETTINGS = (
    "image_size",
    "patch_size",
    "downsample",
    "max_tiles",
    "use_thumbnail",
    "system_message",
    "any_resolution",
    "max_patches",
    "msac",
)
_NOT_SETTINGS = {"processor_class", "auto_map", "chat_template"}

AutoProcessor.register(SailVLConfig, SailVLProcessor, exist_ok=True)
