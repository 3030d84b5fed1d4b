"""Images of every awkward kind: decoded right, or refused with a reason before they hurt."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sailyard.media import BadImage, decode_image, encode_png, image_size

# Pillow warns about damaged metadata before it goes on without it; that it goes on is the point.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:Image size")

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def halves(mode: str = "RGB", size: tuple[int, int] = (40, 20)) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image.convert(mode)


def near(pixel: Any, colour: tuple[int, int, int], tolerance: int = 40) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, colour, strict=True))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds one line of pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * (3 * min(width, 1000) + 1))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def reason(data: bytes, **options: Any) -> str:
    with pytest.raises(BadImage) as raised:
        decode_image(data, **options)
    assert raised.value.detail
    assert str(raised.value).startswith(raised.value.reason)
    return raised.value.reason


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_plain_image(kind: str) -> None:
    image = decode_image(encoded(halves(), kind))
    assert (image.mode, image.size) == ("RGB", (40, 20))
    assert near(image.getpixel((5, 10)), RED)
    assert near(image.getpixel((35, 10)), BLUE)


def test_png_round_trip_is_exact_and_deterministic() -> None:
    values = np.random.default_rng(0).integers(0, 256, (31, 17, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    data = encode_png(image)
    assert np.array_equal(np.asarray(decode_image(data)), values)
    marked = image.copy()
    marked.info = {"comment": "x", "dpi": (72, 72), "icc_profile": b"profile", "exif": b"Exif"}
    assert encode_png(marked) == data
    assert marked.info


def test_cmyk_jpeg() -> None:
    image = decode_image(encoded(halves("CMYK"), "JPEG", quality=95))
    assert image.mode == "RGB"
    assert near(image.getpixel((5, 10)), RED)
    assert near(image.getpixel((35, 10)), BLUE)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_on_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 128))
    decoded = decode_image(encoded(image.convert(mode), "PNG"))
    assert decoded.getpixel((3, 3)) == WHITE
    assert decoded.getpixel((0, 0)) == (0, 0, 0)
    assert decoded.getpixel((1, 0)) == (127, 127, 127)


def test_palette_with_and_without_transparency() -> None:
    palette = halves("P")
    assert near(decode_image(encoded(palette, "PNG")).getpixel((5, 10)), RED)
    left = palette.getpixel((5, 10))
    clear = decode_image(encoded(palette, "PNG", transparency=left))
    assert clear.getpixel((5, 10)) == WHITE
    assert near(clear.getpixel((35, 10)), BLUE)


def test_grey_with_a_transparent_value() -> None:
    grey = Image.new("L", (4, 4), 7)
    grey.putpixel((0, 0), 90)
    decoded = decode_image(encoded(grey, "PNG", transparency=7))
    assert decoded.getpixel((3, 3)) == WHITE
    assert decoded.getpixel((0, 0)) == (90, 90, 90)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_brightness(kind: str) -> None:
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    decoded = np.asarray(decode_image(encoded(Image.fromarray(ramp), kind)))
    assert np.array_equal(decoded[..., 0], (ramp >> 8).astype(np.uint8))
    assert np.array_equal(decoded[..., 0], decoded[..., 2])


def test_black_and_white() -> None:
    assert decode_image(encoded(Image.new("1", (4, 4), 1), "PNG")).getpixel((1, 1)) == WHITE


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    upright = Image.new("RGB", (48, 32), WHITE)
    upright.paste(RED, (0, 0, 16, 16))
    turns = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    turn = turns[orientation]
    stored = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(encoded(stored, "JPEG", quality=95, exif=exif))
    assert decoded.size == (48, 32)
    assert near(decoded.getpixel((6, 6)), RED)
    assert near(decoded.getpixel((40, 6)), WHITE)
    assert near(decoded.getpixel((6, 26)), WHITE)


def test_broken_exif_does_not_cost_the_picture() -> None:
    data = encoded(halves(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage")
    assert decode_image(data).size == (40, 20)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert near(decode_image(data).getpixel((4, 4)), RED)


def test_zero_bytes() -> None:
    assert reason(b"") == "empty"


@pytest.mark.parametrize("junk", [b"\0" * 100, b"hello, world", b"%PDF-1.7 ...", b"<svg></svg>"])
def test_what_is_no_image(junk: bytes) -> None:
    assert reason(junk) == "unknown"


def test_postscript_is_never_run() -> None:
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n") == "unknown"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
def test_truncated_at_many_places(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    for share in (0.005, 0.02, 0.1, 0.5, 0.9):
        assert reason(data[: max(5, int(share * len(data)))]) in ("truncated", "corrupt", "unknown")


def test_truncated_jpeg_says_so() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG")
    assert reason(data[: len(data) // 2]) == "truncated"
    assert reason(data[:20]) == "truncated"


def test_damaged_bytes_never_escape_as_another_error() -> None:
    random = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF"):
        data = bytearray(encoded(halves(size=(64, 64)), kind))
        for _ in range(60):
            damaged = bytearray(data)
            for position in random.integers(0, len(data), 8):
                damaged[position] = int(random.integers(0, 256))
            try:
                assert decode_image(bytes(damaged), max_pixels=1 << 20).mode == "RGB"
            except BadImage:
                continue


def test_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the bomb was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    for side in (9_000, 12_000, 20_000, 100_000):
        assert reason(png_header(side, side)) == "bomb"
    assert reason(png_header(11, 10), max_pixels=109) == "bomb"


def test_limit_is_inclusive() -> None:
    data = encoded(Image.new("RGB", (10, 10)), "PNG")
    assert decode_image(data, max_pixels=100).size == (10, 10)


def test_float_pixels_have_no_agreed_brightness() -> None:
    data = encoded(Image.fromarray(np.full((4, 4), -3.5, dtype=np.float32)), "TIFF")
    assert reason(data) == "unsupported"


@pytest.mark.parametrize("turn", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_the_header_tells_the_size_that_decoding_gives(kind: str, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(halves(), kind, exif=exif)
    assert image_size(data) == decode_image(data).size
    assert image_size(encoded(halves(), kind)) == (40, 20)


def test_a_turn_that_stands_behind_the_pixels_of_a_png_counts() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(halves(), "PNG", exif=exif)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    ending = data.index(b"IEND") - 4
    moved = data[:start] + data[end:ending] + data[start:end] + data[ending:]
    assert image_size(moved) == decode_image(moved).size


def test_a_header_alone_is_refused_for_the_same_reasons() -> None:
    for data in (b"", b"nonsense", png_header(100_000, 100_000)):
        with pytest.raises(BadImage) as raised:
            image_size(data)
        assert raised.value.reason == reason(data)
