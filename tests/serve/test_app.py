"""The server as OpenAI's own client sees it."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn

from lora_deploy.errors import UsageError
from lora_deploy.run import OnnxModel
from lora_deploy.serve import create_app

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, you"}]


@contextmanager
def served(place: Path, **options: Any) -> Iterator[tuple[openai.OpenAI, Any]]:
    """A client of a running server, and the application."""
    app = create_app(OnnxModel(place), **options)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    try:
        with openai.OpenAI(base_url=url, api_key=options.get("api_key") or "none", max_retries=0) as client:
            yield client, app
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def place(talking_branch: Callable[..., Path], tmp_path: Path) -> Path:
    """A hot-swap export with adapters a and b."""
    return Path(shutil.copytree(talking_branch("hot-swap"), tmp_path / "served"))


def expected(place: Path, adapter: str | None, limit: int = 20) -> str:
    """What the model says by itself."""
    model = OnnxModel(place, adapter)
    tokens = model.generate_tokens(model.encode_chat(MESSAGES), max_new_tokens=limit)
    return model.tokenizer.decode(list(tokens), skip_special_tokens=True)


def test_chat_whole_and_streamed(place: Path) -> None:
    answers = {name: expected(place, name) for name in ("a", "b", None)}
    assert len(set(answers.values())) == 3
    with served(place) as (client, _):
        assert [model.id for model in client.models.list()] == ["served", "a", "b"]
        assert client.models.retrieve("a").id == "a"
        for name, text in answers.items():
            asked: Any = {"model": name or "served", "messages": MESSAGES, "temperature": 0, "max_tokens": 20}
            whole = client.chat.completions.create(**asked)
            assert whole.choices[0].message.content == text
            assert whole.choices[0].message.role == "assistant"
            assert whole.model == (name or "served")
            pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
            assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == text
            assert pieces[0].choices[0].delta.role == "assistant"
            assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason
            assert pieces[-1].usage == whole.usage
            assert whole.usage is not None
            assert whole.usage.completion_tokens <= 20
            assert len({piece.id for piece in pieces}) == 1


def test_completions_and_parts(place: Path) -> None:
    model = OnnxModel(place, "a")
    text = model.generate("Hello", chat_template=False, max_new_tokens=16)
    with served(place) as (client, _):
        asked: Any = {"model": "a", "temperature": 0}
        assert client.completions.create(prompt="Hello", **asked).choices[0].text == text
        tokens = model.encode("Hello", chat_template=False)
        assert client.completions.create(prompt=tokens, **asked).choices[0].text == text
        streamed = client.completions.create(prompt=["Hello"], stream=True, **asked)
        assert "".join(piece.choices[0].text for piece in streamed) == text
        parts: Any = [{"role": "user", "content": [{"type": "text", "text": "He"}, {"type": "text", "text": "y"}]}]
        plain: Any = [{"role": "user", "content": "Hey"}]
        answers = {
            client.chat.completions.create(model="a", messages=said, temperature=0).choices[0].message.content
            for said in (parts, plain)
        }
        assert len(answers) == 1


def test_a_seed_repeats_and_stop_texts_end(place: Path) -> None:
    with served(place) as (client, _):
        asked: Any = {"model": "a", "messages": MESSAGES, "max_completion_tokens": 24, "temperature": 1.5}

        def say(**more: Any) -> Any:
            return client.chat.completions.create(**asked, **more).choices[0]

        first = say(seed=1).message.content
        assert first == say(seed=1).message.content
        assert first != say(seed=2).message.content
        stop = first[5:8]
        cut = first[: first.index(stop)]
        ended = say(seed=1, stop=["never seen", stop])
        assert (ended.message.content, ended.finish_reason) == (cut, "stop")
        pieces = client.chat.completions.create(**asked, seed=1, stop=stop, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == cut


def test_adapters_of_different_requests_share_runs(talking_branch: Callable[..., Path]) -> None:
    place = talking_branch("pooled")
    names = ["a", "b", place.name] * 3
    texts = {name: expected(place, None if name == place.name else name, 40) for name in set(names)}
    with served(place, max_batch=5) as (client, app), ThreadPoolExecutor(len(names)) as pool:

        def ask(name: str) -> str | None:
            answer = client.chat.completions.create(model=name, messages=MESSAGES, temperature=0, max_tokens=40)
            return answer.choices[0].message.content

        assert list(pool.map(ask, names)) == [texts[name] for name in names]
        assert 1 < app.state.engine.largest_batch <= 5


def test_an_adapter_that_comes_while_it_runs(place: Path) -> None:
    text = expected(place, "b")
    with served(place, name="base") as (client, _):
        with pytest.raises(openai.NotFoundError, match="there are: base, a, b"):
            client.chat.completions.create(model="new", messages=MESSAGES)
        shutil.copy(place / "adapters" / "b.onnx_adapter", place / "adapters" / "new.onnx_adapter")
        assert "new" in [model.id for model in client.models.list()]
        said = client.chat.completions.create(model="new", messages=MESSAGES, temperature=0, max_tokens=20)
        assert said.choices[0].message.content == text


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"n": 2}, "n is not supported"),
        ({"logprobs": True}, "logprobs is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"extra_body": {"guided_json": "{}"}}, "guided_json is not supported"),
        ({"temperature": -1}, "temperature -1"),
        ({"max_tokens": 0}, "max_new_tokens 0"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 500}]}, "longer than the model's context"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "text"),
    ],
)
def test_what_it_cannot_do_is_refused(more: dict[str, Any], named: str, talking_branch: Callable[..., Path]) -> None:
    with served(talking_branch("pooled")) as (client, _):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**{"model": "a", "messages": MESSAGES, **more})
        assert named in refused.value.message
        assert refused.value.type == "invalid_request_error"
        neutral: Any = {
            "n": 1,
            "presence_penalty": 0,
            "logprobs": False,
            "user": "me",
            "response_format": {"type": "text"},
        }
        client.chat.completions.create(model="a", messages=MESSAGES, max_tokens=1, **neutral)


def test_what_is_null_is_not_said(talking_branch: Callable[..., Path]) -> None:
    with served(talking_branch("pooled")) as (client, _):
        nulls: Any = {"temperature": None, "top_p": None, "stream": None, "stop": None, "seed": None, "n": None}
        answer = client.chat.completions.create(model="a", messages=MESSAGES, max_tokens=2, **nulls)
        history: Any = [*MESSAGES, answer.choices[0].message, MESSAGES[1]]
        assert client.chat.completions.create(model="a", messages=history, max_tokens=2).choices


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "role"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]}, "tool_calls"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "Unicode"),
        ({"messages": MESSAGES, "stop": ["x"] * 17}, "stop"),
        ({"messages": MESSAGES, "stop": "x" * 257}, "stop"),
        ({"messages": MESSAGES, "temperature": 1e-310}, "temperature"),
        ({"messages": MESSAGES, "temperature": float("inf")}, "temperature"),
        ({"prompt": "\ud800"}, "Unicode"),
        ({"prompt": [5, 1000000]}, "does not know"),
        ({"prompt": [5, 2**70]}, "does not know"),
        ({"prompt": []}, "0 prompt tokens"),
        ({"prompt": ["a", "b"]}, "one prompt"),
    ],
)
def test_bodies_that_no_client_would_send(
    body: dict[str, Any], named: str, talking_branch: Callable[..., Path]
) -> None:
    place = talking_branch("pooled")
    with served(place) as (client, _):
        path = "chat/completions" if "messages" in body else "completions"
        request = urllib.request.Request(
            f"{client.base_url}{path}",
            json.dumps({"model": "a", **body}).encode(),
            {"Content-Type": "application/json"},
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        error = json.load(refused.value)["error"]
        assert refused.value.code == 400
        assert named in error["message"]
        assert str(place) not in error["message"]


def test_a_body_without_a_length_is_cut_off(talking_branch: Callable[..., Path]) -> None:
    with served(talking_branch("pooled")) as (client, _):
        place = client.base_url.host, client.base_url.port
        good = json.dumps({"model": "a", "prompt": "Hi", "max_tokens": 1}).encode()
        with closing(http.client.HTTPConnection(*place)) as connection:
            kind = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", iter([good[:9], good[9:]]), kind)
            assert connection.getresponse().status == 200
        sent = 0

        def endless() -> Iterator[bytes]:
            nonlocal sent
            while sent < 512:
                sent += 1
                yield b"x" * (1 << 20)

        with closing(http.client.HTTPConnection(*place)) as connection:
            with suppress(ConnectionError):
                connection.request("POST", "/v1/completions", endless())
            # Whether the answer comes through or the connection is reset: nobody reads on for ever.
            assert 64 < sent < 512
        assert client.models.list().data


def test_a_failure_of_ours_is_an_answer_without_places(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (place / "adapters" / "a.onnx_adapter").write_bytes(b"nothing")
    with served(place) as (client, app):
        with pytest.raises(openai.InternalServerError) as failed:
            client.chat.completions.create(model="a", messages=MESSAGES)
        assert str(place) not in failed.value.message
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="a", messages=MESSAGES, stream=True)

        def fail(*_: Any) -> Any:
            raise RuntimeError(f"secret of {place}")

        monkeypatch.setattr(app.state.engine.model.session, "forward", fail)
        with pytest.raises(openai.InternalServerError) as failed:
            client.chat.completions.create(model="b", messages=MESSAGES)
        assert "secret" not in failed.value.message
    assert "secret" in caplog.text


def test_a_base_that_is_called_as_its_adapter(place: Path) -> None:
    with pytest.raises(UsageError, match="same name"):
        create_app(OnnxModel(place), name="a")


def test_a_key_and_a_limit(talking_branch: Callable[..., Path]) -> None:
    with served(talking_branch("pooled"), api_key="secret") as (client, _):
        assert client.models.list().data
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            client.with_options(api_key="guess").models.list()
        health = str(client.base_url).replace("/v1/", "/health")
        assert json.load(urllib.request.urlopen(health)) == {"status": "ok"}
        # A client that reads once it has written all, of more than the sockets' buffers take.
        body = json.dumps({"model": "a", "prompt": "x" * (32 << 20)})
        for key, status in (("secret", 413), ("guess", 401)):
            connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port)
            with closing(connection):
                connection.request("POST", "/v1/completions", body, {"Authorization": f"Bearer {key}"})
                answer = connection.getresponse()
                assert answer.status == status
                assert json.load(answer)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_stops_its_answer(stream: bool, talking_branch: Callable[..., Path]) -> None:
    with served(talking_branch("pooled")) as (client, app):
        engine = app.state.engine
        engine.model.eos_token_ids = set()
        quick = engine.model.session.forward

        def slow(*given: Any) -> Any:
            time.sleep(0.1)
            return quick(*given)

        engine.model.session.forward = slow
        impatient = client.with_options(timeout=1)
        asked: Any = {"model": "a", "messages": MESSAGES, "temperature": 0}
        if stream:
            pieces = impatient.chat.completions.create(**asked, stream=True)
            next(iter(pieces))
            job = engine._rows[0]
            pieces.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                impatient.chat.completions.create(**asked)
            job = engine._rows[0]
        waited = time.monotonic()
        while engine._rows:
            assert time.monotonic() - waited < 60
            time.sleep(0.05)
        assert job.made < job.limit / 2


def test_a_merged_export_is_one_model(talking_export: Callable[..., tuple[Path, Path]]) -> None:
    place = talking_export()[1]
    with served(place, name="merged") as (client, _):
        assert [model.id for model in client.models.list()] == ["merged"]
        said = client.chat.completions.create(model="merged", messages=MESSAGES, temperature=0, max_tokens=20)
        assert said.choices[0].message.content == expected(place, None)
