"""The API teacher against a real HTTP server that fails, refuses and answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from curation.scores import Scores, api_scores, parse_scores
from curation.teacher import ApiTeacher, Declined, Question, TeacherError, parse_object
from tests.evaluation.tiny import captions

GOOD = '{"vir": 4, "ita": 5}'


class Server(ThreadingHTTPServer):
    """Speaks chat completions; how it answers is set by words in the prompt."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.calls: list[dict[str, Any]] = []
        self.failures_left = 0
        self.in_flight = 0
        self.most_in_flight = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.calls.append(body)
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            fails = server.failures_left > 0
            server.failures_left -= fails
        threading.Event().wait(0.02)
        with server.lock:
            server.in_flight -= 1
        text = next(p["text"] for p in body["messages"][0]["content"] if p["type"] == "text")
        if fails:
            self._reply(503, {"error": {"message": "busy"}})
        elif "forbidden" in text:
            self._reply(400, {"error": {"message": "policy"}})
        elif body["model"] == "missing":
            self._reply(404, {"error": {"message": "no such model"}})
        else:
            finish = "content_filter" if "filtered" in text else "stop"
            content = "I think 4" if "chatty" in text else GOOD
            if "declined" in text:
                content = '{"vir": -1, "ita": -1}'
            message = {"role": "assistant", "content": content}
            choice = {"index": 0, "finish_reason": finish, "message": message}
            self._reply(
                200,
                {
                    "id": "x",
                    "object": "chat.completion",
                    "created": 0,
                    "model": body["model"],
                    "choices": [choice],
                },
            )

    def _reply(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


def test_scores_come_back_in_order_with_the_image_sent(server: Server) -> None:
    samples = list(captions(6))
    teacher = ApiTeacher(server.address, "judge", concurrency=3)
    settled: list[int] = []
    replies = api_scores(teacher, samples, settled.append)
    assert [reply.value for reply in replies] == [Scores(vir=4, ita=5)] * 6
    assert sorted(settled) == [1, 2, 3, 4, 5, 6]
    assert server.most_in_flight <= 3
    image = server.calls[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert image.startswith("data:image/png;base64,")


def test_transient_failures_are_retried(server: Server) -> None:
    server.failures_left = 2
    replies = ApiTeacher(server.address, "judge", 1).ask_many([Question("rate")], parse_scores)
    assert replies[0].value == Scores(4, 5)
    assert len(server.calls) == 3


@pytest.mark.parametrize(
    ("prompt", "reason", "calls"),
    [
        ("forbidden", "refused", 1),
        ("filtered", "filtered", 1),
        ("declined", "refused", 1),
        ("chatty", "unparsable", 2),
    ],
)
def test_what_is_not_an_answer_is_counted_by_reason(
    server: Server, prompt: str, reason: str, calls: int
) -> None:
    (reply,) = ApiTeacher(server.address, "judge", 1).ask_many([Question(prompt)], parse_scores)
    assert reply.value is None
    assert reply.reason == reason
    assert len(server.calls) == calls


def test_a_wrong_model_name_stops_at_once(server: Server) -> None:
    with pytest.raises(TeacherError, match=r"'missing'.*api_model"):
        ApiTeacher(server.address, "missing", 2).ask_many([Question("a")] * 3, parse_scores)


def test_an_api_teacher_needs_an_address() -> None:
    with pytest.raises(TeacherError, match="oracle"):
        ApiTeacher("", "judge", 1)


@pytest.mark.parametrize(
    "text",
    [
        '{"vir": 0, "ita": 3}',
        '{"vir": 3.5, "ita": 3}',
        '{"vir": true, "ita": 3}',
        '{"vir": 3}',
        '{"vir": 3, "ita": 3, "why": ""}',
        "[3, 3]",
        'Sure: {"vir": 3, "ita": 3}',
    ],
)
def test_scores_are_read_strictly(text: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_scores(text)
    assert not isinstance(caught.value, Declined)


def test_a_fenced_object_is_accepted() -> None:
    assert parse_object('```json\n{"a": 1}\n```') == {"a": 1}
