"""A conversation with a server, over Chat Completions: no model, no torch on this machine.

Any server of that API will do. Not here: the prompt's lines (talk.py).
"""

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from overleap.cli import screen
from overleap.errors import RequestError

SILENCE_S = 60.0  # a server that says nothing for so long is gone; ours gives a sign every 5 s


@dataclass(frozen=True)
class Remote:
    """A server.

    url  up to /v1 or before it; key: "" for none
    Raises RequestError for an address that is none, or where nobody answers.
    """

    url: str
    key: str = ""

    def __post_init__(self) -> None:
        if not (self.key.isascii() and (self.key.isprintable() or not self.key)):
            raise RequestError(
                "the key holds characters that no key has",  # it is a secret: not shown
                "is there a line end in it, or a typographic dash?",
            )
        try:
            parts = urlsplit(self.url)
            known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is no number, half an IPv6 address
            known = False
        if not known:
            raise RequestError(
                f"--url is {self.url!r}", "it is an address like http://127.0.0.1:8000"
            )
        if parts.scheme == "http" and self.key and parts.hostname not in ("127.0.0.1", "localhost"):
            screen.note(f"the key goes to {parts.hostname} unencrypted")

    def model(self) -> str:
        """The first model that it serves."""
        with self._open("/models", None) as response:
            found = _read(response)
        data = found.get("data") if isinstance(found, dict) else None
        first = data[0] if isinstance(data, list) and data else None
        if not isinstance(first, dict) or not first.get("id"):
            raise RequestError(f"{self.url} serves no model", "name one with --model")
        return str(first["id"])

    def say(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Stream an answer to the screen; the message, as it goes back with the next question.

        Raises RequestError with the server's own sentence where it refuses or breaks off.
        """
        began, first, usage, cut = time.monotonic(), None, None, False
        content: list[str] = []
        reasoning: list[str] = []
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with self._open("/chat/completions", asked) as response:
            for event in _events(response):
                if error := event.get("error"):
                    why = error.get("message") if isinstance(error, dict) else error
                    raise RequestError(f"the server broke off: {why}")
                usage = event.get("usage") or usage
                thought, said = _said(event)
                cut = cut or _is_cut(event)
                if thought:
                    reasoning.append(thought)
                    screen.talk.print(_whole(thought), style="dim", end="", markup=False)
                if said:
                    content.append(said)
                    sys.stdout.write(_whole(said))
                    sys.stdout.flush()
                first = first or (time.monotonic() if content or reasoning else None)
        sys.stdout.write("\n")
        sys.stdout.flush()
        if cut:
            screen.note("the answer was cut: no more tokens were allowed (--max-tokens)")
        _account(usage, began, first)
        answer = {"role": "assistant", "content": "".join(content)}
        return answer | ({"reasoning_content": "".join(reasoning)} if reasoning else {})

    def _open(self, path: str, body: Mapping[str, Any] | None) -> Any:
        base = self.url.rstrip("/")
        base += "" if base.endswith("/v1") else "/v1"
        headers = {"content-type": "application/json"}
        if self.key:
            headers["authorization"] = f"Bearer {self.key}"
        raw = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(base + path, raw, headers)
        try:
            return urllib.request.urlopen(request, timeout=SILENCE_S)
        except urllib.error.HTTPError as error:
            with error:
                raise RequestError(_refusal(error)) from None
        except (OSError, HTTPException, ValueError) as error:  # URLError, paths that are none
            reason = getattr(error, "reason", error)
            raise RequestError(f"{self.url} does not answer: {reason}") from None


def _refusal(error: urllib.error.HTTPError) -> str:
    said = _read(error)
    inner = said.get("error") if isinstance(said, dict) else None
    message = inner.get("message") if isinstance(inner, dict) else error.reason
    return f"the server refused ({error.code}): {message}"


def _read(response: Any) -> Any:
    try:
        return json.loads(response.read())
    except (ValueError, OSError, HTTPException):
        return None


def _events(response: Any) -> Iterator[dict[str, Any]]:
    """The data of server-sent events, up to [DONE]. Raises RequestError where that never comes."""
    try:
        for line in response:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if not isinstance(event, dict):
                raise ValueError(f"an event is {data[:80]!r}")
            yield event
    except (OSError, ValueError, HTTPException) as error:
        raise RequestError(f"the server broke off: {error!r}") from None
    raise RequestError("the server broke off: the answer ended before its end")


def _said(event: Mapping[str, Any]) -> tuple[str, str]:
    """What an event adds to the reasoning and to the content. RequestError where it is no event of
    this API; one without choices, or a choice without a delta, says nothing."""
    try:
        deltas = [choice.get("delta") or {} for choice in event.get("choices") or ()]
        thought = "".join(delta.get("reasoning_content") or "" for delta in deltas)
        return thought, "".join(delta.get("content") or "" for delta in deltas)
    except (AttributeError, TypeError):
        said = json.dumps(event)[:80]
        raise RequestError(f"the server broke off: an event is {said}") from None


def _is_cut(event: Mapping[str, Any]) -> bool:
    return any(choice.get("finish_reason") == "length" for choice in event.get("choices") or ())


def _whole(text: str) -> str:
    """Without halves of characters, which some servers send and no terminal takes."""
    return text.encode("utf-8", "replace").decode()


def _account(usage: Any, began: float, first: float | None) -> None:
    """What it took, where the server counts as others do."""
    if not isinstance(usage, dict) or first is None:
        return
    read, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(read, int) or not isinstance(written, int):
        return
    details = usage.get("prompt_tokens_details")
    hit = details.get("cached_tokens") if isinstance(details, dict) else 0
    seconds = time.monotonic() - first
    # The first token was there when the clock began.
    rate = f", {(written - 1) / seconds:,.1f} tokens/s" if written > 1 and seconds > 0 else ""
    parts = [
        f"{read:,} tokens read ({hit or 0} cached)",
        f"first token after {first - began:.2f} s",
        f"{written:,} written" + rate,
    ]
    screen.note(" · ".join(parts))


def conversation(
    remote: Remote, lines: Iterator[str], settings: Mapping[str, Any], model: str | None
) -> None:
    """Say each line and show the answer; /new starts over. A refused line is not remembered."""
    name = model or remote.model()
    screen.note(f"talking with {name} at {remote.url}")
    messages: Sequence[Mapping[str, Any]] = []
    for line in lines:
        if line == "/new":
            messages = []
            continue
        said = [*messages, {"role": "user", "content": line}]
        try:
            answer = remote.say({"model": name, "messages": said, **settings})
        except RequestError as error:
            screen.show_error(error)
            continue
        messages = [*said, answer]
