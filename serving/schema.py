"""The part of OpenAI's chat completions API that this server speaks, as pydantic models.

A field that would change the reply and is not spoken here is refused by name instead of being
ignored; its neutral value (``n=1``, ``logprobs=false``, ...) is let through because clients send
it unasked.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# field -> values that mean "not used". None always does.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    # Kept by the caller's side or about accounting: they never change a reply.
    "user": (...,),
    "metadata": (...,),
    "store": (...,),
    "service_tier": (...,),
    "safety_identifier": (...,),
    "prompt_cache_key": (...,),
}


class Strict(BaseModel):
    """Base: what is not named is an error."""

    model_config = ConfigDict(extra="forbid")


class TextPart(Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """``data:image/...;base64,...``; ``detail`` is taken and means nothing here."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Strict):
    """An image, at its place between the texts."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(BaseModel):
    """One turn. Reasoning that a client sends back with an old reply is dropped: the released
    format keeps no old thoughts in its history."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None

    @model_validator(mode="after")
    def _nothing_unspoken(self) -> Message:
        known = {"name", "reasoning", "reasoning_content"}
        for field, value in (self.model_extra or {}).items():
            if field not in known and value not in (None, [], {}):
                raise ValueError(f"message field {field!r} is not supported; leave it out")
        return self


class TemplateSwitches(Strict):
    """``chat_template_kwargs``."""

    enable_thinking: bool = False


class StreamOptions(Strict):
    """``stream_options``."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class ChatRequest(BaseModel):
    """Body of POST /v1/chat/completions."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[Message] = Field(min_length=1)
    temperature: float = Field(0.0, ge=0.0, le=2.0)
    """0 = greedy, as the released models are evaluated (OpenAI's own default is 1)."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    chat_template_kwargs: TemplateSwitches = TemplateSwitches()

    @field_validator("temperature", "top_p", "stream", "chat_template_kwargs", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > 4 or any(not 0 < len(stop) <= 256 for stop in stops):
            raise ValueError("give at most 4 stop strings of 1 to 256 characters")
        return value

    @model_validator(mode="after")
    def _nothing_unspoken(self) -> ChatRequest:
        for field, value in (self.model_extra or {}).items():
            if value is None:
                continue
            if field not in NEUTRAL:
                raise ValueError(f"{field!r} is not a field of this API; leave it out")
            if ... not in NEUTRAL[field] and value not in NEUTRAL[field]:
                raise ValueError(f"{field!r} is not supported by this server; leave it out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings as a tuple, empty when none were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def token_limit(self) -> int | None:
        """``max_completion_tokens``, or its older name."""
        return self.max_completion_tokens or self.max_tokens
