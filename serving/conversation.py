"""From a request's messages to what the processor takes: turns with image places, and images."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from model.chat import IMAGE_PLACEHOLDER, with_thinking
from sailyard.media import BadImage, decode_image
from serving.errors import ApiError
from serving.schema import ImagePart, Message, TextPart
from serving.settings import ServingSettings

IMAGE_PLACE = IMAGE_PLACEHOLDER + "\n"

_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns as the chat format takes them, and the images in the order of their places."""

    messages: list[dict[str, str]]
    images: list[Image.Image]


def read_conversation(
    messages: Sequence[Message], *, thinking: bool, settings: ServingSettings
) -> Conversation:
    """Check the turns, decode the images and, for thinking, add the released suffix.

    Raises:
        ApiError: too many turns or images, a turn out of order, reserved text, an image that is
            not inline, not an image, or too large.
    """
    if len(messages) > settings.max_messages:
        raise ApiError(
            f"{len(messages)} messages, at most {settings.max_messages} are taken", param="messages"
        )
    _check_order(messages)
    turns: list[dict[str, str]] = []
    images: list[Image.Image] = []
    for index, message in enumerate(messages):
        text = _turn_text(message, f"messages[{index}]", images, settings)
        role = "system" if message.role == "developer" else message.role
        turns.append({"role": role, "content": text})
    if thinking:
        turns[-1]["content"] = with_thinking(turns[-1]["content"])
    return Conversation(turns, images)


def _check_order(messages: Sequence[Message]) -> None:
    for index, message in enumerate(messages):
        if message.role in ("system", "developer") and index > 0:
            raise ApiError(
                "a system message can only be the first one", param=f"messages[{index}].role"
            )
    if messages[-1].role != "user":
        raise ApiError(
            "the last message must be the user's; continuing a reply is not supported",
            param=f"messages[{len(messages) - 1}].role",
        )


def _turn_text(
    message: Message, where: str, images: list[Image.Image], settings: ServingSettings
) -> str:
    content = message.content
    parts = (
        [TextPart(type="text", text=content or "")] if not isinstance(content, list) else content
    )
    pieces: list[str] = []
    for index, part in enumerate(parts):
        param = f"{where}.content[{index}]" if isinstance(content, list) else f"{where}.content"
        if isinstance(part, ImagePart):
            if message.role != "user":
                raise ApiError("only a user's message can hold an image", param=param)
            if len(images) >= settings.max_images:
                raise ApiError(f"more than {settings.max_images} images", param=param)
            spent = sum(image.width * image.height for image in images)
            images.append(_image(part.image_url.url, param, settings.max_pixels - spent))
            pieces.append(IMAGE_PLACE)
        else:
            pieces.append(part.text if message.role != "user" else _checked(part.text, param))
    if sum(isinstance(part, TextPart) for part in parts) == 1:
        # One question about some images, in either order: images come first in all training data,
        # so that is where they go. Several texts are an interleaved document and stay as they are.
        pieces.sort(key=lambda piece: piece != IMAGE_PLACE)
    return "".join(pieces)


def _checked(text: str, param: str) -> str:
    # Every other control token is spelled out by the processor; this one is a place for an image.
    if IMAGE_PLACEHOLDER in text:
        raise ApiError(
            f"the text holds {IMAGE_PLACEHOLDER!r}, which marks an image's place; "
            "send the image itself as an image_url part",
            param=param,
        )
    return text


def _image(url: str, param: str, pixels_left: int) -> Image.Image:
    head = _DATA_URL.match(url)
    if head is None:
        # Fetching what a client names would let it reach whatever this server can reach.
        kind = "http(s) and file URLs are never fetched" if "://" in url[:16] else "not a data URL"
        raise ApiError(
            f"{kind}; send the image inline as data:image/png;base64,...",
            code="invalid_image_url",
            param=param,
        )
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(
            f"the data URL is not valid base64: {error}", code="invalid_base64", param=param
        ) from error
    try:
        return decode_image(data, max_pixels=max(pixels_left, 0))
    except BadImage as error:
        raise ApiError(
            f"the image cannot be used ({error.reason}): {error.detail}",
            code="invalid_image",
            param=param,
        ) from error
