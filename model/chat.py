"""The chat format of the released checkpoints. No torch here.

ChatML-like turns with nothing between `<|im_end|>` and the next `<|im_start|>`. Thinking is
asked for in the user turn; there is no template switch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
IMG_START = "<img>"
IMG_END = "</img>"
IMG_CONTEXT = "<IMG_CONTEXT>"
THINK_START = "<think>"
THINK_END = "</think>"
BOX_START = "<box>"
BOX_END = "</box>"
IMAGE_PLACEHOLDER = "<image>"

# Constants of the released checkpoints; they must match byte for byte.
DEFAULT_SYSTEM_MESSAGE = (
    "你是由抖音内容理解组开发的多模态大模型，英文名叫UniVL, 是一个有用无害的人工智能助手。"
)
THINKING_SUFFIX = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the "
    "final answer. The reasoning process MUST BE enclosed within <think> </think> tags. The final "
    "answer MUST BE put in \\boxed{}."
)
SHORT_ANSWER_SUFFIX = "\nAnswer the question using a single word or phrase."
LONG_ANSWER_SUFFIX = "\nAnswer this question in detail."

ROLES = ("system", "user", "assistant")

Message = Mapping[str, str]


class ChatError(ValueError):
    """A conversation that the format cannot express."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of text between control tokens.

    Attributes:
        role: system, user or assistant.
        header: `"user\\n"` and the like, straight after `<|im_start|>`.
        content: the turn's text; images are still `<image>`.
        trained: whether content and the closing `<|im_end|>` carry loss.
        closed: False for the generation prompt, which ends after its header.
    """

    role: str
    header: str
    content: str
    trained: bool
    closed: bool = True


def with_thinking(question: str) -> str:
    """The question with the thinking suffix on its own line, as the evaluation harness asks."""
    return f"{question}\n{THINKING_SUFFIX}"


def segments(
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    system_message: str = DEFAULT_SYSTEM_MESSAGE,
) -> list[Segment]:
    """Turns in order, the default system turn put first when the conversation has none.

    Args:
        messages: `{"role", "content"}` each; a system turn may come first only.
        add_generation_prompt: end with an open assistant turn.
        system_message: the default; "" means no system turn at all (our choice for tiny models,
            whose rows are too short to carry it).

    Raises:
        ChatError: an unknown role, a system turn that is not first, or content that is no text.
    """
    turns: list[Segment] = []
    has_system = bool(messages) and messages[0].get("role") == "system"
    if not has_system and system_message:
        turns.append(Segment("system", "system\n", system_message, trained=False))
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ChatError(f"message {index} has role {role!r}; roles are {', '.join(ROLES)}")
        if role == "system" and index > 0:
            raise ChatError(f"message {index} is a system turn; move it to the front")
        if not isinstance(content, str):
            raise ChatError(f"message {index} ({role}) has no text content, got {content!r}")
        turns.append(Segment(role, f"{role}\n", content, trained=role == "assistant"))
    if add_generation_prompt:
        turns.append(Segment("assistant", "assistant\n", "", trained=False, closed=False))
    return turns


def render(
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    system_message: str = DEFAULT_SYSTEM_MESSAGE,
) -> str:
    """The conversation as one string, images still `<image>`; arguments as in `segments`."""
    turns = segments(messages, add_generation_prompt, system_message)
    return "".join(
        IM_START + turn.header + turn.content + (IM_END if turn.closed else "") for turn in turns
    )


def count_images(messages: Sequence[Message]) -> int:
    """Number of `<image>` placeholders in the user turns."""
    return sum(
        message["content"].count(IMAGE_PLACEHOLDER)
        for message in messages
        if message.get("role") == "user"
    )
