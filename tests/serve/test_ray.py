"""The application of Ray Serve, as OpenAI's own client sees it: two replicas on a local Ray."""

from __future__ import annotations

import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from lora_deploy.adapter import write_adapter
from lora_deploy.export import export_onnx
from lora_deploy.run import OnnxModel
from tests.conftest import random_adapter, save_tiny, tiny_model
from tests.run.conftest import byte_tokenizer

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, you"}]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where a local Ray serves, without leaving anything at home or telling anybody."""
    ray = pytest.importorskip("ray", reason='ray is not installed: pip install "lora-deploy[ray]"')
    serve = pytest.importorskip("ray.serve")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex())
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield f"http://127.0.0.1:{port}"
            serve.shutdown()
        finally:
            ray.shutdown()


def deploy(address: str, route: str, **arguments: Any) -> openai.OpenAI:
    """Run an application as `serve run` does, with its arguments as words; a client of it."""
    from ray import serve

    from lora_deploy.serve.ray import Arguments, app

    built = app(Arguments.model_validate({name: str(value) for name, value in arguments.items()}))
    serve.run(built, name=route, route_prefix=f"/{route}")
    return openai.OpenAI(
        base_url=f"{address}/{route}/v1", api_key=arguments.get("api_key", "none"), max_retries=0, timeout=60
    )


@pytest.fixture(scope="module")
def place(talking_branch: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hot-swap export with adapters a and b."""
    return Path(shutil.copytree(talking_branch("hot-swap"), tmp_path_factory.mktemp("ray") / "served"))


@pytest.fixture(scope="module")
def client(address: str, place: Path) -> openai.OpenAI:
    """Of two replicas."""
    return deploy(address, "two", directory=place, replicas=2)


def expected(place: Path, adapter: str | None) -> str:
    """What the model says by itself."""
    model = OnnxModel(place, adapter)
    tokens = model.generate_tokens(model.encode_chat(MESSAGES), max_new_tokens=20)
    return model.tokenizer.decode(list(tokens), skip_special_tokens=True)


def ask(client: openai.OpenAI, name: str) -> tuple[str | None, str]:
    """The answer, and the replica that gave it."""
    raw = client.chat.completions.with_raw_response.create(model=name, messages=MESSAGES, temperature=0, max_tokens=20)
    return raw.parse().choices[0].message.content, raw.headers["x-replica"]


def test_the_answers_are_those_of_the_model_alone(client: openai.OpenAI, place: Path) -> None:
    answers = {name: expected(place, name) for name in ("a", "b", None)}
    assert len(set(answers.values())) == 3
    assert [model.id for model in client.models.list()] == ["served", "a", "b"]
    assert client.models.retrieve("b").id == "b"
    for name, text in answers.items():
        asked: Any = {"model": name or "served", "temperature": 0, "max_tokens": 20}
        whole = client.chat.completions.create(messages=MESSAGES, **asked)
        assert (whole.choices[0].message.content, whole.model) == (text, name or "served")
        pieces = list(
            client.chat.completions.create(
                messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **asked
            )
        )
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == text
        assert pieces[-1].usage == whole.usage
        plain = client.completions.create(prompt="Hello", **asked).choices[0].text
        assert plain == OnnxModel(place, name).generate("Hello", chat_template=False, max_new_tokens=20)


def test_errors_are_those_of_the_plain_server(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'new' does not exist; there are: served, a, b") as missing:
        client.chat.completions.create(model="new", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("new")
    with pytest.raises(openai.BadRequestError, match="n is not supported"):
        client.chat.completions.create(model="a", messages=MESSAGES, n=2)
    with pytest.raises(openai.BadRequestError, match="longer than the model's context"):
        client.completions.create(model="a", prompt="x" * 500, stream=True)
    with pytest.raises(openai.BadRequestError, match="model"):
        client.post("/chat/completions", body={"messages": MESSAGES}, cast_to=object)


def test_adapters_that_come_while_it_runs_stay_with_a_replica(client: openai.OpenAI, place: Path) -> None:
    text = expected(place, "b")
    for name in "cd":
        shutil.copy(place / "adapters" / "b.onnx_adapter", place / "adapters" / f"{name}.onnx_adapter")
        assert name in [model.id for model in client.models.list()]
        assert ask(client, name)[0] == text
        time.sleep(2)  # Ray learns where it is some tenths of a second later
    homes = {name: {ask(client, name)[1] for _ in range(12)} for name in "cd"}
    assert {name: len(found) for name, found in homes.items()} == {"c": 1, "d": 1}
    # The base has no home: one replica alone would get 40 requests once in 10^12.
    with ThreadPoolExecutor(4) as pool:
        assert len({replica for _, replica in pool.map(lambda _: ask(client, "served"), range(40))}) == 2


def test_a_key_a_full_queue_and_a_client_that_goes(address: str, tmp_path: Path) -> None:
    """One replica that writes one answer at a time, of a model whose answers take many seconds."""
    long = {"vocab_size": 260, "max_position_embeddings": 1 << 15}
    base = save_tiny("llama", "none", tmp_path / "base", **long)
    byte_tokenizer().save_pretrained(base)
    write_adapter(random_adapter(tiny_model("llama", **long)), tmp_path / "one")
    options: Any = {"merge": False, "branch": "pooled", "quantization": "none", "verify": False}
    export_onnx(base, {"one": tmp_path / "one"}, output=tmp_path / "out", **options)
    client = deploy(address, "one", directory=tmp_path / "out", max_batch=1, max_waiting=1, api_key="secret")
    with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
        client.with_options(api_key="guess").models.list()

    def begin(stream: bool = True, limit: int = 30_000, **options: Any) -> Any:
        asked: Any = {"model": "one", "prompt": "x", "max_tokens": limit, "temperature": 0, "stream": stream}
        return client.with_options(**options).completions.create(**asked)

    with ThreadPoolExecutor(2) as pool:
        running = begin()
        next(iter(running))
        waiting = [pool.submit(begin) for _ in range(2)]  # one at the replica, one before it
        time.sleep(2)
        with pytest.raises(openai.RateLimitError, match="too many requests"):
            begin()
        assert not any(one.done() for one in waiting)
        began = time.monotonic()
        running.close()
        for one in waiting:
            one.result(60).close()
    with pytest.raises(openai.APITimeoutError):
        begin(stream=False, timeout=1)
    assert begin(stream=False, limit=1).usage.completion_tokens == 1
    assert time.monotonic() - began < 20
