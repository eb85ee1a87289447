"""Commands that talk with a model: ask, chat, generate.

Not here: how a request is served and shown (session.py), a server elsewhere (remote.py).
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer

from overleap.cli import screen
from overleap.cli.app import (
    CACHE_SPACE,
    CacheDir,
    CacheKind,
    CacheSpace,
    Device,
    Effort,
    Json,
    Keep,
    MaxTokens,
    Memory,
    Model,
    Seed,
    Temperature,
    Thinking,
    Verify,
    app,
    text_of,
)
from overleap.cli.kept import Keeping, default_folder
from overleap.cli.preflight import preflight
from overleap.cli.remote import Remote, conversation
from overleap.cli.room import Room, open_front
from overleap.cli.session import Session, open_session
from overleap.errors import OverleapError, RequestError, StateError

AROUND_QUESTION = 16  # tokens of a prompt beside document and question, and one torn by the cut


@app.command()
def ask(
    context: typer.Context,
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Texts, - is stdin.")],
    question: Annotated[str, typer.Argument(help="What to ask about them.")],
    model: Model = "mini",
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    effort: Effort = None,
    thinking: Thinking = None,
    cache: CacheKind = "release",
    memory: Memory = None,
    device: Device = "cpu",
    keep: Keep = True,
    cache_dir: CacheDir = None,
    cache_space: CacheSpace = CACHE_SPACE,
    verify: Verify = False,
    as_json: Json = False,
) -> None:
    """Read files whole and answer a question about them.

    What was read is kept on disk: the next question about the same files is answered at once.

    Example: `overleap ask README.md "What is the project called?"`
    """
    from overleap.chat.dialects import ask_prompt
    from overleap.engine.request import Sampling

    room, keeping = Room.of(cache, memory, verify, device), Keeping.of(keep, cache_dir, cache_space)
    preflight(None if keeping is None else keeping.folder or default_folder())
    text, front = "\n\n".join(text_of(name).rstrip() for name in files), open_front(model)
    prompt = ask_prompt(text, question, front.profile, thinking=thinking, effort=effort)
    room.expect_text(front, prompt.text, max_tokens)
    ids = front.tokenizer.encode_prompt(prompt)
    session = open_session(context, front, room, len(ids) + max_tokens, keeping)
    sampling = Sampling(temperature=temperature, seed=seed, max_tokens=max_tokens)
    branch = max(0, len(ids) - len(front.tokenizer.encode(question)) - AROUND_QUESTION)
    told = session.reply(prompt.reply, ids, sampling, not as_json, branch)
    if as_json:
        screen.put_json(
            {
                "reply": asdict(told.reply),
                "usage": asdict(told.finish.usage),
                "seed": told.finish.seed,
                "speculation": session.speculation(),
                "experts": session.experts(),
                "verified": told.verified,
            }
        )
    _end(session, told.finish)


@app.command()
def chat(
    context: typer.Context,
    model: Model = "mini",
    tokens: Annotated[
        int, typer.Option("--context", help="Tokens the conversation may grow to.")
    ] = 32768,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 1.0,
    seed: Seed = None,
    effort: Effort = None,
    thinking: Thinking = None,
    memory: Memory = None,
    device: Device = "cpu",
    keep: Keep = True,
    cache_dir: CacheDir = None,
    cache_space: CacheSpace = CACHE_SPACE,
    verify: Verify = False,
    url: Annotated[
        str | None, typer.Option(help="Talk to this server instead, like http://127.0.0.1:8000.")
    ] = None,
    key: Annotated[
        str, typer.Option(envvar="OVERLEAP_KEY", help="API key for it.", show_default=False)
    ] = "",
) -> None:
    """Talk with a model. An empty line or end of input leaves, /new starts over.

    Example: `overleap chat --model ./my-checkpoint --temperature 0`
    """
    if url is not None:
        settings: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
        settings |= _there(seed=seed, reasoning_effort=effort)
        if thinking is not None:
            settings["thinking"] = {"type": "enabled" if thinking else "disabled"}
        conversation(Remote(url, key.strip()), _lines(), settings, _only_remote(context, model))
        return
    from overleap.chat.dialects import render_chat
    from overleap.engine.request import Sampling

    room = Room.of("release", memory, verify, device)
    keeping = Keeping.of(keep, cache_dir, cache_space)
    front = open_front(model)
    room.expect(front, tokens)
    session = open_session(context, front, room, tokens, keeping)
    sampling = Sampling(temperature=temperature, seed=seed, max_tokens=max_tokens)
    messages: list[dict[str, Any]] = []
    for line in _lines():
        if line == "/new":
            messages = []
            continue
        said = [*messages, {"role": "user", "content": line}]
        try:
            prompt = render_chat(said, profile=front.profile, thinking=thinking, effort=effort)
            ids = front.tokenizer.encode_prompt(prompt)
            told = session.reply(prompt.reply, ids, sampling, echo=True, branch=0)
        except StateError:
            raise
        except OverleapError as error:
            screen.show_error(error)
            continue
        answer = {"role": "assistant", "content": told.reply.content}
        if told.reply.reasoning:
            answer["reasoning_content"] = told.reply.reasoning
        messages = [*said, answer]
        _end(session, told.finish)


def _end(session: Session, finish: Any) -> None:
    """What an answer took, and that it is not whole, which cannot be seen on it."""
    session.close(finish.usage)
    if finish.reason == "length":
        tokens = finish.usage.generated_tokens
        screen.note(f"the answer was cut after {tokens:,} tokens, --max-tokens allows more")


def _there(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _only_remote(context: typer.Context, model: str) -> str | None:
    """The model that was named. Raises RequestError for options of a model on this machine."""

    def given(name: str) -> bool:
        source = context.get_parameter_source(name)
        return source is not None and source.name == "COMMANDLINE"

    for name in ("tokens", "memory", "keep", "cache_dir", "cache_space", "verify"):
        if given(name):
            option = "context" if name == "tokens" else name.replace("_", "-")
            raise RequestError(
                f"--{option} is for a model on this machine, and --url names another"
            )
    return model if given("model") else None


def _lines() -> Iterator[str]:
    """What the user types, until an empty line or the end."""
    while True:
        if sys.stdin.isatty():
            screen.talk.print("[bold]you:[/] ", end="")
        try:
            line = sys.stdin.readline().strip()
            line.encode()  # where the locale is C, bytes that are no text come as surrogates
        except UnicodeError:
            raise RequestError(
                "what comes from standard input is not UTF-8 text",
                "convert it first, for example with iconv",
            ) from None
        if not line:
            return
        yield line


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="Text to continue, - is stdin.")],
    model: Model = "mini",
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 1.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest that hold this share.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest.")] = None,
    min_p: Annotated[float, typer.Option(help="Keep what is this likely beside the top.")] = 0.0,
    seed: Seed = None,
    cache: CacheKind = "release",
    memory: Memory = None,
    device: Device = "cpu",
    verify: Verify = False,
    as_json: Json = False,
) -> None:
    """Continue a text, without any chat format.

    Example: `overleap generate "def main(" --max-tokens 64 --temperature 0`
    """
    from overleap.engine.request import Request, Sampling

    room, front = Room.of(cache, memory, verify, device), open_front(model)
    text = text_of("-") if prompt == "-" else prompt
    room.expect_text(front, text, max_tokens + 1)
    ids = [front.tokenizer.bos_id, *front.tokenizer.encode(text)]
    sampling = Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        max_tokens=max_tokens,
    )
    session = open_session(context, front, room, len(ids) + max_tokens)
    decoder, request = front.tokenizer.decoder(), Request(prompt=ids, sampling=sampling)
    pieces = []

    def push(token: int) -> bool:
        pieces.append(decoder.push(token))
        if not as_json:
            sys.stdout.write(pieces[-1])
            sys.stdout.flush()
        return False

    completion = session.complete(request, push)
    pieces.append(decoder.flush())
    if not as_json:
        sys.stdout.write(pieces[-1] + "\n")
    verified, finish = session.verified(request, completion), completion.finish
    if as_json:
        screen.put_json(
            {
                "text": "".join(pieces),
                "reason": finish.reason,
                "seed": finish.seed,
                "usage": asdict(finish.usage),
                "speculation": session.speculation(),
                "experts": session.experts(),
                "verified": verified,
            }
        )
    session.close(finish.usage)
