"""The endpoint over real HTTP with OpenAI's own client."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from PIL import Image

from model.checkpoint import load_model
from model.generation import generate
from serving.thinking import split
from tests.serving.conftest import BLUE, CONTEXT, RED, data_url, http

THINK = {"chat_template_kwargs": {"enable_thinking": True}}


def ask(client: OpenAI, content: Any, **options: Any) -> Any:
    messages = options.pop("messages", None) or [{"role": "user", "content": content}]
    options = {"model": "production", **options}
    return client.chat.completions.create(messages=messages, **options)


def image_part(image: Image.Image | bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def test_plain_question(client: OpenAI) -> None:
    reply = ask(client, "hello")
    choice = reply.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "I am first.")
    assert choice.finish_reason == "stop"
    assert choice.message.reasoning is None
    assert reply.model == "first"
    assert reply.usage.prompt_tokens > 3
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


@pytest.mark.parametrize("image_first", [True, False])
@pytest.mark.parametrize(("image", "colour"), [(RED, "red"), (BLUE, "blue")])
def test_image_question(client: OpenAI, image: Image.Image, colour: str, image_first: bool) -> None:
    parts = [image_part(image), text_part("Which colour?")]
    reply = ask(client, parts if image_first else parts[::-1])
    assert reply.choices[0].message.content == colour


def test_reasoning_is_apart(client: OpenAI) -> None:
    reply = ask(client, "5 + 7?", extra_body=THINK)
    message = reply.choices[0].message
    assert message.content == "\\boxed{12}"
    assert message.reasoning == message.reasoning_content == "5 and 7 make 12"
    assert reply.usage.completion_tokens_details.reasoning_tokens > 0
    assert ask(client, "5 + 7?").choices[0].message.content == "12"


@pytest.mark.parametrize("content", ["hello", "count", "5 + 7?"])
@pytest.mark.parametrize("extra", [{}, THINK])
def test_stream_equals_whole(client: OpenAI, content: str, extra: dict[str, Any]) -> None:
    whole = ask(client, content, extra_body=extra, max_tokens=64)
    text, reasoning, finishes, usage = "", "", [], None
    for chunk in ask(
        client,
        content,
        extra_body=extra,
        max_tokens=64,
        stream=True,
        stream_options={"include_usage": True},
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            extra_fields = choice.delta.model_extra or {}
            reasoning += extra_fields.get("reasoning") or ""
            assert extra_fields.get("reasoning") == extra_fields.get("reasoning_content")
            finishes.append(choice.finish_reason)
    message = whole.choices[0].message
    assert text == message.content
    assert reasoning == (message.reasoning or "")
    assert finishes[-1] == whole.choices[0].finish_reason
    assert not any(finishes[:-1])
    assert usage == whole.usage


def test_stream_comes_in_pieces(address: str) -> None:
    body = {"model": "first", "stream": True, "messages": [{"role": "user", "content": "count"}]}
    with http.stream("POST", f"{address}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len(events) > 10
    assert len({event["id"] for event in events}) == 1


def test_limits_and_stops(client: OpenAI) -> None:
    short = ask(client, "count", max_tokens=5)
    assert short.choices[0].finish_reason == "length"
    assert short.usage.completion_tokens == 5
    cut = ask(client, "count", stop=["4", " 3"])
    assert cut.choices[0].message.content == "0 1 2"
    assert cut.choices[0].finish_reason == "stop"


def test_seed_fixes_the_reply(client: OpenAI) -> None:
    def draw(seed: int) -> str:
        reply = ask(client, "count", temperature=2.0, seed=seed, max_tokens=24)
        return str(reply.choices[0].message.content)

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1
    narrow = ask(client, "count", temperature=2.0, top_p=0.01, seed=1, max_tokens=24)
    greedy = ask(client, "count", max_tokens=24)
    assert narrow.choices[0].message.content == greedy.choices[0].message.content


def test_neighbours_do_not_change_a_reply(client: OpenAI) -> None:
    """Prompts of different lengths, with and without images, written in one batch."""
    questions: list[tuple[Any, dict[str, Any], str]] = [
        ("hello", {}, "I am first."),
        ("count", {}, " ".join(str(n) for n in range(40))),
        ([image_part(BLUE), text_part("Which colour?")], {}, "blue"),
        ("5 + 7?", THINK, "\\boxed{12}"),
        ([image_part(RED), text_part("Which colour?")], {}, "red"),
    ] * 4
    with ThreadPoolExecutor(len(questions)) as pool:
        replies = pool.map(lambda each: ask(client, each[0], extra_body=each[1]), questions)
        got = [reply.choices[0].message.content for reply in replies]
    assert got == [answer for _, _, answer in questions]


def test_replies_are_those_of_the_evaluation(client: OpenAI, checkpoints: dict[str, Path]) -> None:
    """The endpoint and `model.generation` answer alike, also to what was never learned."""
    model, processor = load_model(checkpoints["first"])
    asked = [("5 7 12", []), ("hello, red?", []), ("Which colour?", [BLUE]), ("count blue", [RED])]
    prompts = [
        ([{"role": "user", "content": "<image>\n" * len(images) + text}], images)
        for text, images in asked
    ]
    expected = [done.text for (done,) in generate(model, processor, prompts, max_new_tokens=24)]
    got = [
        ask(client, [*map(image_part, images), text_part(text)], max_tokens=24)
        for text, images in asked
    ]
    assert [reply.choices[0].message.content for reply in got] == [
        split(text).content for text in expected
    ]


def test_history_and_system_turn_are_read(client: OpenAI) -> None:
    history = [
        {"role": "user", "content": "5 + 7?"},
        {"role": "assistant", "content": "12", "reasoning": "old thoughts", "refusal": None},
        {"role": "user", "content": "hello"},
    ]
    plain = ask(client, "hello").usage.prompt_tokens
    longer = ask(client, None, messages=history, max_tokens=1).usage.prompt_tokens
    with_system = [{"role": "developer", "content": "Be brief."}, *history]
    longest = ask(client, None, messages=with_system, max_tokens=1).usage.prompt_tokens
    assert plain < longer < longest
    without = [{k: v for k, v in turn.items() if k != "reasoning"} for turn in history]
    assert ask(client, None, messages=without, max_tokens=1).usage.prompt_tokens == longer


def test_several_images_take_their_places(client: OpenAI) -> None:
    one = ask(client, [image_part(RED), text_part("Which colour?")]).usage.prompt_tokens
    two = ask(client, [image_part(RED), image_part(BLUE), text_part("Which colour?")])
    assert two.usage.prompt_tokens > one
    assert two.choices[0].finish_reason in ("stop", "length")


# --- what is refused ------------------------------------------------------------------------------


def bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    return buffer.getvalue()


def truncated() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 60).save(buffer, "PNG")
    return buffer.getvalue()[:2000]


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"plain text", "unknown"), (b"", "empty"), (bomb(), "bomb"), (truncated(), "truncated")],
)
def test_bad_images(client: OpenAI, data: bytes, reason: str) -> None:
    with pytest.raises(openai.BadRequestError, match=reason) as error:
        ask(client, [image_part(data), text_part("?")])
    assert error.value.code == "invalid_image"
    assert error.value.param == "messages[0].content[0]"


def url_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


USER = {"role": "user", "content": "hello"}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("http image", {"content": [url_part("http://169.254.169.254/a.png")]}, "never fetched"),
    ("file image", {"content": [url_part("file:///etc/passwd")]}, "never fetched"),
    ("path image", {"content": [url_part("/etc/passwd")]}, "not a data URL"),
    ("bad base64", {"content": [url_part("data:image/png;base64,a*b")]}, "base64"),
    ("video", {"content": [{"type": "video_url"}]}, "messages.0..content.0."),
    ("placeholder", {"content": "<image> what?"}, "<image>"),
    ("many images", {"content": [image_part(RED)] * 17}, "more than 16 images"),
    ("response format", {"response_format": {"type": "json_object"}}, "response_format"),
    ("n", {"n": 2}, "'n'"),
    ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}, "'tools'"),
    ("unknown", {"extra_body": {"beams": 4}}, "'beams' is not a field"),
    ("switch", {"extra_body": {"chat_template_kwargs": {"think": True}}}, "think"),
    ("temperature", {"temperature": 3}, "temperature"),
    ("long reply", {"max_tokens": 5000}, "at most 4096"),
    ("long reply for the context", {"max_tokens": CONTEXT}, "tokens"),
    ("long prompt", {"content": "5 " * 2000}, "at most"),
    ("no messages", {"messages": []}, "messages"),
    ("late system", {"messages": [USER, {"role": "system", "content": "x"}, USER]}, "system"),
    ("reply last", {"messages": [USER, {"role": "assistant", "content": "x"}]}, "last message"),
    ("role", {"messages": [{"role": "robot", "content": "x"}]}, "role"),
    ("turns", {"messages": [USER] * 65}, "65 messages"),
]


@pytest.mark.parametrize(
    ("options", "words"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_bad_requests(client: OpenAI, options: dict[str, Any], words: str) -> None:
    options = dict(options)
    if options.get("messages") == []:
        options["messages"] = ()
    with pytest.raises(openai.BadRequestError, match=words):
        client.chat.completions.create(
            **{
                "model": "production",
                "messages": [{"role": "user", "content": options.pop("content", "hello")}],
                **options,
            }
        )


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[" * 100_000, b"null", b'{"model": "\\ud800"}', b"\xff\xfe", b'{"messages": 1}'],
    ids=["empty", "cut", "deep", "null", "surrogate", "not utf-8", "wrong type"],
)
def test_not_a_request(address: str, body: bytes) -> None:
    response = http.post(f"{address}/v1/chat/completions", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_unknown_model_and_route(client: OpenAI, address: str) -> None:
    with pytest.raises(openai.NotFoundError, match="'production' or 'first'"):
        ask(client, "hello", model="gpt-4o")
    assert http.get(f"{address}/v2").json()["error"]["code"] == "not_found"


def test_huge_body(client: OpenAI, address: str) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        ask(client, "x" * 2**21)
    assert error.value.status_code == 413
    # Without a declared length the bytes themselves are counted.
    response = http.post(
        f"{address}/v1/chat/completions", content=(b"x" * 2**16 for _ in range(64))
    )
    assert response.status_code == 413


def test_the_server_still_answers(client: OpenAI) -> None:
    """After everything above."""
    assert ask(client, "hello").choices[0].message.content == "I am first."


# --- around the chat ------------------------------------------------------------------------------


def test_models_health_ready_metrics(client: OpenAI, address: str) -> None:
    assert [model.id for model in client.models.list()] == ["production", "first"]
    assert client.models.retrieve("first").id == "first"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("second")
    assert http.get(f"{address}/health").status_code == 200
    ready = http.get(f"{address}/ready")
    assert ready.status_code == 200
    assert ready.json()["model"] == "first"
    ask(client, "hello")
    figures = http.get(f"{address}/metrics").text
    assert 'sailyard_serving_requests_total{status="200"}' in figures
    assert 'sailyard_serving_version{digest="digest-first",model="first"} 1.0' in figures
    assert "sailyard_serving_first_token_seconds_bucket" in figures
