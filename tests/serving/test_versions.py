"""Another version takes over while clients are talking; nobody is dropped or mixed up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from openai import OpenAI

from tests.serving.conftest import Yard, http, serve, wait_until

GREETINGS = {"first": "I am first.", "second": "I am second."}
MakeClient = Callable[[str], OpenAI]


def greet(client: OpenAI, **options: object) -> tuple[str, str]:
    reply = client.chat.completions.create(
        model="production", messages=[{"role": "user", "content": "hello"}], **options
    )
    return reply.model, reply.choices[0].message.content


def stream_greeting(client: OpenAI) -> tuple[str, str]:
    models, text = set(), ""
    for chunk in client.chat.completions.create(
        model="production", messages=[{"role": "user", "content": "hello"}], stream=True
    ):
        models.add(chunk.model)
        text += chunk.choices[0].delta.content or ""
    assert len(models) == 1
    return models.pop(), text


def test_switching_under_load_drops_nothing(
    checkpoints: dict[str, Path], make_client: MakeClient
) -> None:
    yard = Yard(checkpoints, "first")
    with serve(yard) as (url, _):
        client, stop = make_client(url), threading.Event()
        replies: list[tuple[str, str]] = []
        errors: list[Exception] = []

        def talk(ask: Callable[[OpenAI], tuple[str, str]]) -> None:
            while not stop.is_set():
                try:
                    replies.append(ask(client))
                except Exception as error:
                    errors.append(error)

        def wait_for(name: str) -> None:
            wait_until(
                lambda: errors or (replies and replies[-1][0] == name), f"{name} does not answer"
            )

        threads = [
            threading.Thread(target=talk, args=(ask,)) for ask in (greet, stream_greeting) * 2
        ]
        for thread in threads:
            thread.start()
        try:
            wait_for("first")
            for name in ("second", "first", "second"):
                yard.promoted = name
                answer = http.post(f"{url}/admin/reload").json()
                assert (answer["changed"], answer["model"]) == (True, name)
                wait_for(name)
        finally:
            stop.set()
        for thread in threads:
            thread.join()
        assert not errors
        assert {name for name, _ in replies} == {"first", "second"}
        assert all(GREETINGS[name] == text for name, text in replies)
        assert greet(client)[0] == "second"


def test_a_long_stream_ends_with_the_version_it_began_with(
    checkpoints: dict[str, Path], make_client: MakeClient
) -> None:
    yard = Yard(checkpoints, "first")
    with serve(yard) as (url, versions):
        client = make_client(url)
        stream = client.chat.completions.create(
            model="first", messages=[{"role": "user", "content": "count"}], stream=True
        )
        chunks = [next(stream)]
        old = versions.current
        assert old is not None
        yard.promoted = "second"
        assert http.post(f"{url}/admin/reload").json()["changed"]
        assert greet(client) == ("second", "I am second.")
        with pytest.raises(openai.NotFoundError, match="no model 'first'"):
            client.chat.completions.create(
                model="first", messages=[{"role": "user", "content": "x"}]
            )
        chunks += list(stream)
        assert {chunk.model for chunk in chunks} == {"first"}
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == " ".join(str(n) for n in range(40))
        wait_until(lambda: not old.engine.alive, "the old version was not let go")


def test_polling_finds_a_promotion(checkpoints: dict[str, Path], make_client: MakeClient) -> None:
    yard = Yard(checkpoints, None)
    with serve(yard, poll_seconds=0.05) as (url, _):
        assert http.get(f"{url}/health").status_code == 200
        ready = http.get(f"{url}/ready")
        assert (ready.status_code, ready.json()["error"]) == (503, "nothing is promoted")
        with pytest.raises(openai.InternalServerError, match="nothing is promoted") as error:
            greet(make_client(url))
        assert error.value.status_code == 503
        yard.promoted = "first"
        wait_until(
            lambda: http.get(f"{url}/ready").status_code == 200, "the promotion was not found"
        )
        assert greet(make_client(url)) == ("first", "I am first.")


def test_a_broken_promotion_keeps_the_good_version(
    checkpoints: dict[str, Path], tmp_path: Path, make_client: MakeClient
) -> None:
    yard = Yard({**checkpoints, "broken": tmp_path}, "first")
    with serve(yard) as (url, _):
        yard.promoted = "broken"
        answer = http.post(f"{url}/admin/reload")
        assert answer.status_code == 500
        assert "config.json" in answer.json()["error"]
        assert greet(make_client(url)) == ("first", "I am first.")
        assert 'reloads_total{outcome="failed"} 1.0' in http.get(f"{url}/metrics").text
        yard.promoted = "second"
        assert http.post(f"{url}/admin/reload").json()["error"] is None


def test_key_is_asked_for(checkpoints: dict[str, Path]) -> None:
    with serve(Yard(checkpoints, "first"), api_key="secret") as (url, _):
        for headers in ({"Authorization": "Bearer wrong"}, {}):
            response = http.get(f"{url}/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert http.post(f"{url}/admin/reload").status_code == 401
        assert http.get(f"{url}/health").status_code == 200
        good = OpenAI(base_url=f"{url}/v1", api_key="secret")
        assert greet(good) == ("first", "I am first.")


def test_full_queue_is_said(
    checkpoints: dict[str, Path], make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_batch": 1, "max_queue": 1}
    body = {"model": "first", "stream": True, "messages": [{"role": "user", "content": "count"}]}
    with serve(Yard(checkpoints, "first"), **options) as (url, versions):
        served = versions.current
        assert served is not None
        engine, chat = served.engine, f"{url}/v1/chat/completions"
        go_on, step = threading.Event(), engine._batch.step

        def held() -> list[int]:
            go_on.wait(120)
            return step()

        monkeypatch.setattr(engine._batch, "step", held)
        with http.stream("POST", chat, json=body):
            wait_until(lambda: engine.num_running == 1, "the first is not written")
            with http.stream("POST", chat, json=body):
                wait_until(lambda: engine.num_waiting == 1, "the second does not wait")
                refused = http.post(chat, json=body | {"stream": False})
                assert refused.status_code == 429
                assert refused.json()["error"]["code"] == "queue_full"
        # Both clients hung up in mid-stream: their rows leave, and the next one is answered.
        wait_until(lambda: not served.leases, "nobody saw that the clients are gone")
        go_on.set()
        wait_until(lambda: not engine.num_running, "rows of clients that are gone are written")
        assert greet(make_client(url))[1] == "I am first."


def test_a_failing_step_is_one_error_not_the_end(
    checkpoints: dict[str, Path], make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(Yard(checkpoints, "first")) as (url, versions):
        assert versions.current is not None
        batch = versions.current.engine._batch

        def out_of_memory() -> list[int]:
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(batch, "step", out_of_memory)
            with pytest.raises(openai.InternalServerError, match="the model failed"):
                greet(make_client(url))
            with pytest.raises(openai.APIError, match="the model failed"):
                stream_greeting(make_client(url))
        assert greet(make_client(url))[1] == "I am first."
