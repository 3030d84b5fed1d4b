"""Encoded images in, RGB pixels out, and back; hostile files are refused with a reason."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# 64 megapixels: above any camera frame a caption set holds, below the size where Pillow itself
# begins to warn (89 megapixels). Our choice.
MAX_PIXELS = 64_000_000

# Named one by one because Pillow would otherwise try every plugin it has, among them EPS, which
# starts Ghostscript on the file.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

# What may turn an image is in its header, but for PNG, where it may also stand behind the pixels:
# in a chunk of its own, or in texts with these keywords.
_PNG_TURNS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
_ORIENTATION = 0x0112
_ON_ITS_SIDE = (5, 6, 7, 8)

_MAGIC = (b"\x89PNG", b"\xff\xd8", b"RIFF", b"GIF8", b"II*\x00", b"MM\x00*")


class BadImage(ValueError):
    """An image that cannot be used.

    Attributes:
        reason: A slug to count by: "empty", "unknown", "bomb", "truncated", "corrupt" or
            "unsupported".
        detail: What was found, for a person.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file to RGB as a viewer would show it.

    The EXIF rotation is applied, transparency is laid on white, CMYK, palette and 16-bit grey
    become 8-bit RGB, and of an animation the first frame is taken. The pixel count is read from
    the header and checked before anything is decoded.

    Args:
        data: The file's bytes.
        max_pixels: Most pixels (width x height) that will be decoded.

    Raises:
        BadImage: The bytes are empty, of no known format, cut off, damaged, too large, or hold
            pixels that have no agreed meaning as RGB.
    """
    image = _open(data, max_pixels)
    try:
        image.load()
    except Exception as error:  # a damaged file can raise nearly anything inside a codec
        raise _damaged(error) from error
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # an unreadable EXIF block leaves good pixels: keep them as stored
        image.info.pop("exif", None)
    rgb = _to_rgb(image)
    rgb.info = {}
    return rgb


def image_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height that `decode_image` gives, from the header alone.

    Raises:
        BadImage: As `decode_image`, for what the header tells.
    """
    image = _open(data, max_pixels)
    width, height = image.size
    if image.format == "TIFF":  # Pillow has turned its size already
        return width, height
    if image.format == "PNG" and not any(mark in data for mark in _PNG_TURNS):
        return width, height
    try:
        turned = image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
    except Exception:  # as in decode_image: an unreadable EXIF block turns nothing
        turned = False
    return (height, width) if turned else (width, height)


def encode_png(image: Image.Image) -> bytes:
    """Encode as RGB PNG without metadata: equal pixels give equal bytes."""
    plain = image.convert("RGB") if image.mode != "RGB" else image.copy()
    plain.info = {}
    buffer = io.BytesIO()
    plain.save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """The image with its header read and its size checked."""
    if not data:
        raise BadImage("empty", "the file has zero bytes")
    image = _header(data)
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage(
            "bomb", f"{width}x{height} is {width * height} pixels, the limit is {max_pixels}"
        )
    return image


def _header(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage("bomb", str(error)) from error
    except UnidentifiedImageError as error:
        if data.startswith(_MAGIC):
            raise BadImage(
                "truncated", f"an image header cut off after {len(data)} bytes"
            ) from error
        raise BadImage("unknown", f"not an image of a known format ({data[:8]!r}...)") from error
    except Exception as error:  # as in decode_image: codecs raise nearly anything
        raise _damaged(error) from error


def _damaged(error: Exception) -> BadImage:
    if isinstance(error, Image.DecompressionBombError):
        return BadImage("bomb", str(error))
    cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
    return BadImage("truncated" if cut else "corrupt", f"{type(error).__name__}: {error}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadImage("unsupported", "floating-point grey values have no agreed brightness")
    if image.mode.startswith("I"):
        image = _grey16_to_grey8(image)
    has_alpha = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    try:
        if not has_alpha:
            return image.convert("RGB")
        rgba = image.convert("RGBA")
    except (ValueError, OSError) as error:
        raise BadImage("unsupported", f"pixel mode {image.mode}: {error}") from error
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _grey16_to_grey8(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips 16-bit values at 255, which turns most of the picture white.
    values = np.asarray(image).astype(np.int64)
    if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise BadImage("unsupported", "grey values outside 0-65535 have no agreed brightness")
    return Image.fromarray((values >> 8).astype(np.uint8))
