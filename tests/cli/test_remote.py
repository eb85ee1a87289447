"""`overleap chat --url` against a whole server: what it shows, remembers and refuses."""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from overleap.cli import app, remote
from overleap.errors import RequestError
from tests.server.live import NAME, Live, live, scripted


def script(prompt: str) -> str:
    said = f"You said {prompt.count('<｜User｜>')} things."
    return said if prompt.endswith("</think>") else f"Counting.</think>{said}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("remote"), scripted(script), needs_keys=True) as running:
        yield running


def talk(*options: str, text: str = "one\ntwo\n\n") -> Result:
    return CliRunner().invoke(app, ["chat", *options], input=text, catch_exceptions=False)


def test_a_conversation_is_remembered_and_started_over(server: Live) -> None:
    options = ("--url", server.url, "--key", server.key(), "--temperature", "0")
    result = talk(*options, text="one\ntwo\n/new\nthree\n\n")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "You said 1 things.", "You said 2 things.", "You said 1 things."
    ]  # fmt: skip
    assert result.stderr.count("Counting.") == 3, "reasoning is talk, not data"
    assert NAME in result.stderr and "first token after" in result.stderr


def test_settings_reach_the_server(server: Live) -> None:
    options = ("--url", f"{server.url}/v1/", "--key", server.key(), "--model", NAME)
    result = talk(*options, "--no-thinking", "--max-tokens", "3", text="one\n\n")
    assert "Counting" not in result.stderr
    assert len(result.stdout) < len("You said 1 things.\n")


def test_refusals_are_told_and_the_conversation_goes_on(server: Live) -> None:
    result = talk("--url", server.url, "--key", server.key(), "--model", "other")
    assert result.exit_code == 0
    assert result.stderr.count("the server refused (404): the model 'other' is not served") == 2
    with pytest.raises(RequestError, match=r"refused \(401\)"):
        talk("--url", server.url)


def test_an_answer_that_was_cut_is_said_to_be(server: Live) -> None:
    options = ("--url", server.url, "--key", server.key(), "--no-thinking", "--max-tokens", "3")
    assert talk(*options, text="one\n\n").stderr.count("the answer was cut") == 1
    assert "was cut" not in talk(*options[:-1], "90", text="one\n\n").stderr


def test_a_key_is_taken_as_it_was_meant_and_never_shown(server: Live) -> None:
    assert talk("--url", server.url, "--key", f"{server.key()}\r\n").exit_code == 0
    for key in ("ol-se\ncret", "ol\u2013secret"):
        with pytest.raises(RequestError, match="characters that no key has") as refused:
            talk("--url", server.url, "--key", key)
        assert "cret" not in str(refused.value) and "cret" not in str(refused.value.hint)


def test_halves_of_characters_are_shown_as_what_they_are_not() -> None:
    assert remote._whole("a\ud83d") == "a?" and remote._whole("\U0001f600") == "\U0001f600"


def test_addresses_that_are_none(tmp_path: Path) -> None:
    for url in ("ftp://127.0.0.1", "file:///etc/passwd", "localhost:8000", "http://",
                "http://127.0.0.1:80a", "http://[::1"):  # fmt: skip
        with pytest.raises(RequestError, match="--url is"):
            talk("--url", url)
    with pytest.raises(RequestError, match="does not answer"):
        talk("--url", "http://127.0.0.1:9")  # discard: nobody listens
    with pytest.raises(RequestError, match="--cache-dir is for a model on this machine"):
        talk("--url", "http://127.0.0.1:9", "--cache-dir", str(tmp_path))


@contextmanager
def speaking(raw: bytes) -> Iterator[str]:
    """The address of something that answers every connection with these bytes."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def run() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(raw)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
HI = b'data:{"choices": [{"delta": {"content": "hi"}}]}\n\n'


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "does not answer"),
        (HEAD + HI, "the answer ended before its end"),
        (HEAD.replace(b"200 OK", b"200 OK\r\nContent-Length: 9999") + HI, "broke off"),
        (HEAD + b'data: {"error": "boom"}\n\n', "broke off: boom"),
        (HEAD + b'data: {"error": {"message": "full"}}\n\n', "broke off: full"),
        (HEAD + b'data: ["hi"]\n\n', "broke off: ValueError"),
        (HEAD + b'data: {"choices": ["hi"]}\n\n', "broke off: an event is {"),
        (HEAD + b'data: {"choices": 7}\n\n', "broke off: an event is {"),
        (HEAD + b'data: {"choices": [{"delta": {"content": [7]}}]}\n\n', "broke off: an event is"),
    ],
)
def test_what_is_no_whole_answer_is_told(raw: bytes, sentence: str) -> None:
    with speaking(raw) as url:
        result = talk("--url", url, "--model", "any", text="one\n\n")
    assert result.exit_code == 0 and sentence in result.stderr


def test_a_stream_without_blanks_and_with_empty_errors_is_read() -> None:
    end = b'data:{"error": null, "choices": []}\n\ndata: [DONE]\n\n'
    with speaking(HEAD + HI + end) as url:
        result = talk("--url", url, "--model", "any", text="one\n\n")
    assert result.stdout == "hi\n" and "broke off" not in result.stderr


def test_what_other_servers_leave_out_is_not_missed() -> None:
    """No choices or delta beside a finish or a usage, and a usage that counts otherwise."""
    said = b'{"choices": null}', b'{"choices": [{"finish_reason": "stop"}], "usage": {"total": 2}}'
    events = b"".join(b"data: " + one + b"\n\n" for one in (*said, b"[DONE]"))
    with speaking(HEAD + HI + events) as url:
        result = talk("--url", url, "--model", "any", text="one\n\n")
    assert result.stdout == "hi\n" and "broke off" not in result.stderr
    assert "written" not in result.stderr


@pytest.mark.parametrize(("written", "told"), [(1, "1 written\n"), (41, " tokens/s")])
def test_the_first_token_is_no_speed(written: int, told: str) -> None:
    counted = b'{"prompt_tokens": 3, "completion_tokens": %d}' % written
    events = b'data: {"choices": [], "usage": %s}\n\ndata: [DONE]\n\n' % counted
    with speaking(HEAD + HI + events) as url:
        result = talk("--url", url, "--model", "any", text="one\n\n")
    assert "3 tokens read (0 cached)" in result.stderr and told in result.stderr


@pytest.mark.parametrize("models", [b'{"data": [{}]}', b'{"data": {"a": 1}}', b"[]", b"no"])
def test_a_list_of_models_that_names_none(models: bytes) -> None:
    with (
        speaking(HEAD + models) as url,
        pytest.raises(RequestError, match="serves no model") as caught,
    ):
        talk("--url", url)
    assert caught.value.hint == "name one with --model"


def test_questions_that_are_no_text_are_refused() -> None:
    with pytest.raises(RequestError, match="not UTF-8 text"):
        CliRunner().invoke(
            app, ["chat", "--url", "http://127.0.0.1:9", "--model", "any"],
            input=b"hi \xff\n", catch_exceptions=False,
        )  # fmt: skip


def test_no_torch_is_loaded(server: Live) -> None:
    code = (
        "import sys; from overleap.cli import app; "
        f"app(['chat', '--url', '{server.url}', '--key', '{server.key()}'], "
        "standalone_mode=False); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input="hello\n\n", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "You said 1 things.\n"
