"""Files broken on purpose, as a crawl brings them: ingestion must set every one aside.

One file per item, and every kind fails in its own way, so the quarantine's counts can be checked.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

from PIL import Image

from curation.world.draw import encode

KINDS = (
    "truncated", "empty", "bomb", "caption_encoding", "caption_empty", "unknown", "bad_video",
    "symlink_escape",
)  # fmt: skip
"""What is wrong, by the reason that ingestion must give."""


def _picture(seed: int) -> Image.Image:
    """A gradient, different for each item, with enough detail that half a file lacks some."""
    return Image.linear_gradient("L").rotate(seed * 7).resize((64, 64)).convert("RGB")


def _jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    _picture(seed).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def bomb_png(side: int = 60_000) -> bytes:
    """A valid PNG header that announces side x side pixels, a few bytes on disk."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\x00" * 4096)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def write_broken(folder: Path, num: int) -> None:
    """`num` broken items in a new folder, the kinds in turn."""
    folder.mkdir(parents=True)
    for i in range(num):
        _write(folder, f"item-{i:03d}", KINDS[i % len(KINDS)], i)


def _write(folder: Path, name: str, kind: str, seed: int) -> None:
    caption = b"a caption of a broken item"
    image = folder / f"{name}.png"
    if kind == "truncated":
        image = folder / f"{name}.jpg"
        data = _jpeg(seed)
        image.write_bytes(data[: len(data) // 2])
    elif kind == "empty":
        image.write_bytes(b"")
    elif kind == "bomb":
        image.write_bytes(bomb_png())
    elif kind == "unknown":
        image.write_bytes(b"this is no image at all")
    elif kind == "bad_video":
        image = folder / f"{name}.mp4"
        image.write_bytes(b"\x00\x00\x00\x18ftypmp42" + b"\x00" * 64)
    elif kind == "symlink_escape":
        os.symlink("/", image)
        return  # a caption of its own would be a second item
    else:
        image.write_bytes(encode(_picture(seed)))
        caption = "caf\u00e9 au lait".encode("latin-1") if kind == "caption_encoding" else b"  \n"
    (folder / f"{name}.txt").write_bytes(caption)
