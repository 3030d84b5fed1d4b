"""One item of a user's data on its way to a sample, and why it may be refused.

Readers yield `Record`s (bytes and words as found) or `Rejected`; `to_sample` turns the former into
a sample or a rejection. Nothing raises for what a user's file holds.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from curation.userdata.clips import BadClip, clip_frames
from curation.world.captions import PROMPTS, VIDEO_PROMPTS
from model.chat import IM_END, IM_START, IMG_CONTEXT, IMG_END, IMG_START
from sailyard.media import BadImage, decode_image
from sailyard.samples import IMAGE_PLACEHOLDER, Sample

# Bounds, our choice: far above honest data, below what would fill a machine.
MAX_IMAGE_BYTES = 64 << 20
MAX_VIDEO_BYTES = 1 << 30
MAX_TEXT_CHARACTERS = 32_768
MAX_IMAGES = 16
# Longest side kept, pixels: the most that any recipe's encoder sees (paper section 6.1).
MAX_SIDE = 1792

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif",
)  # fmt: skip
VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v")
_CONTROL = (IM_START, IM_END, IMG_START, IMG_END, IMG_CONTEXT)
_ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "model": "assistant", "system": "system",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rejected:
    """An item set aside. `name` says where it was, `reason` is a slug to count by."""

    name: str
    reason: str
    detail: str


def printable(name: str) -> str:
    """A name that any file can hold: bytes that are not UTF-8 are written as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


class Refusal(ValueError):
    """Why an item cannot become a sample; caught where items become samples."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(slots=True)
class Record:
    """Raw material of one sample: encoded images or one encoded video, and its words.

    Exactly one of `caption`, `messages` is used; `caption` None and no messages is refused.
    """

    name: str
    images: list[bytes] = field(default_factory=list)
    video: bytes | None = None
    caption: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)


def checked_text(text: Any, what: str) -> str:
    """Words fit for training, or Refusal: right encoding, not empty, no control tokens, bounded."""
    if not isinstance(text, str):
        raise Refusal("caption_missing", f"the {what} is a {type(text).__name__}, not text")
    # Bytes that were not UTF-8 arrive as lone surrogates; U+FFFD is what others made of them.
    if any("\ud800" <= c <= "\udfff" for c in text) or "\ufffd" in text or "\x00" in text:
        raise Refusal("caption_encoding", f"the {what} is not UTF-8; save it again as UTF-8")
    stripped = text.strip()
    if not stripped:
        raise Refusal("caption_empty", f"the {what} is empty")
    if len(stripped) > MAX_TEXT_CHARACTERS:
        raise Refusal(
            "caption_too_long",
            f"the {what} has {len(stripped)} characters, the limit is {MAX_TEXT_CHARACTERS}",
        )
    for token in _CONTROL:
        if token in stripped:
            raise Refusal("control_token", f"the {what} holds {token!r}, which steers the model")
    return stripped


def normalise_messages(raw: Any) -> list[dict[str, str]]:
    """Turns of a conversation in any common spelling (role/content, from/value), or Refusal."""
    if not isinstance(raw, list) or not raw:
        raise Refusal("bad_record", "messages are not a list of turns")
    out = []
    for turn in raw:
        if not isinstance(turn, Mapping):
            raise Refusal("bad_record", f"a turn is a {type(turn).__name__}, not an object")
        role = _ROLES.get(str(turn.get("role", turn.get("from"))).lower())
        if role is None:
            raise Refusal("bad_record", f"unknown role {turn.get('role', turn.get('from'))!r}")
        out.append(
            {"role": role, "content": checked_text(turn.get("content", turn.get("value")), "turn")}
        )
    roles = [turn["role"] for turn in out if turn["role"] != "system"]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise Refusal("bad_record", "turns must alternate user, assistant and end in an answer")
    return out


def checked_image(data: bytes) -> bytes:
    """The image as it will be stored: decodable, PNG or JPEG, at most MAX_SIDE a side."""
    if len(data) > MAX_IMAGE_BYTES:
        raise Refusal("too_large", f"{len(data)} bytes, the limit is {MAX_IMAGE_BYTES}")
    try:
        image = decode_image(data)
    except BadImage as error:
        raise Refusal(error.reason, error.detail) from error
    if min(image.size) < 2:
        raise Refusal("too_small", f"{image.width}x{image.height} pixels")
    plain = data.startswith((b"\x89PNG", b"\xff\xd8"))
    if plain and max(image.size) <= MAX_SIDE:
        return data
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return encode_jpeg(image)


def encode_jpeg(image: Image.Image) -> bytes:
    """High-quality JPEG: photographs and frames would be several times larger as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def to_sample(record: Record, source: str, num_frames: int) -> Sample | Rejected:
    """The sample of a record, or why there is none."""
    try:
        return _sample(record, source, num_frames)
    except Refusal as refusal:
        return Rejected(printable(record.name), refusal.reason, refusal.detail)


def _sample(record: Record, source: str, num_frames: int) -> Sample:
    # Words first: they are cheap to check.
    caption = None
    if not record.messages:
        if record.caption is None:
            raise Refusal("caption_missing", "no caption, question or conversation goes with it")
        caption = checked_text(record.caption, "caption")
        if IMAGE_PLACEHOLDER in caption:
            raise Refusal("control_token", f"the caption holds {IMAGE_PLACEHOLDER!r}")
    is_video = record.video is not None
    images = _media(record, num_frames)
    digest = int.from_bytes(hashlib.sha256(printable(record.name).encode()).digest()[:4], "big")
    if caption is not None:
        prompts = VIDEO_PROMPTS if is_video else PROMPTS
        messages = [
            {"role": "user", "content": prompts[digest % len(prompts)]},
            {"role": "assistant", "content": caption},
        ]
        task, meta = "caption", {"caption": caption, "quality": "unknown"}
    else:
        messages, task, meta = [dict(m) for m in record.messages], "mixed", {}
    _place_images(messages, len(images), is_video)
    name = printable(record.name)
    meta["origin"] = name
    return Sample(f"{source}/{name}", source, task, messages, images, is_video, meta)


def _media(record: Record, num_frames: int) -> list[bytes]:
    if record.video is not None:
        if len(record.video) > MAX_VIDEO_BYTES:
            raise Refusal("too_large", f"{len(record.video)} bytes, the limit is {MAX_VIDEO_BYTES}")
        try:
            frames = clip_frames(record.video, num_frames)
        except BadClip as error:
            raise Refusal(error.reason, error.detail) from error
        return [encode_jpeg(frame) for frame in frames]
    if not record.images:
        raise Refusal("image_missing", "no image or video goes with the words")
    if len(record.images) > MAX_IMAGES:
        raise Refusal("too_large", f"{len(record.images)} images, the limit is {MAX_IMAGES}")
    return [checked_image(data) for data in record.images]


def _place_images(messages: list[dict[str, str]], num_images: int, is_video: bool) -> None:
    """Make the user turns hold one placeholder per image: as given, or all in the first turn."""
    given = sum(m["content"].count(IMAGE_PLACEHOLDER) for m in messages if m["role"] == "user")
    said = sum(m["content"].count(IMAGE_PLACEHOLDER) for m in messages)
    if said != given:
        raise Refusal("control_token", f"{IMAGE_PLACEHOLDER!r} stands outside a user turn")
    first = next(m for m in messages if m["role"] == "user")
    if is_video:
        bare = first["content"].replace("<video>", "").replace(IMAGE_PLACEHOLDER, "").strip()
        first["content"] = "".join(f"Frame-{i + 1}: <image>\n" for i in range(num_images)) + bare
        given = sum(m["content"].count(IMAGE_PLACEHOLDER) for m in messages)
    elif given == 0:
        first["content"] = f"{IMAGE_PLACEHOLDER}\n" * num_images + first["content"]
        given = num_images
    if given != num_images:
        raise Refusal("bad_record", f"{given} image placeholders for {num_images} images")
