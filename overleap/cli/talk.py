"""Commands that talk with a model: ask, chat, generate, demo.

Not here: what they print it with (screen.py) or how a reply comes to be (engine, chat).
"""

import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import typer

from overleap.cli import screen
from overleap.cli.app import (
    CacheDir,
    CacheKind,
    CacheSpace,
    Effort,
    Json,
    Keep,
    MaxTokens,
    Memory,
    Model,
    Seed,
    Temperature,
    Thinking,
    app,
    cache_format_of,
    text_of,
)
from overleap.cli.kept import note_trouble, open_disk
from overleap.errors import OverleapError
from overleap.machine import size

CACHE_SPACE = "4GiB"
AROUND_QUESTION = 16  # tokens of a prompt beside document and question, and one torn by the cut


@dataclass(frozen=True)
class Opened:
    """A model ready to talk to. `digest` names its weights, "" where no manifest does."""

    model: Any
    tokenizer: Any
    profile: Any
    digest: str


def _open(name: str, cache_format: str = "release") -> Opened:
    """Load model, tokenizer and chat profile, with a bar while bytes are verified."""
    from overleap.chat.profiles import profile_for
    from overleap.chat.tokenizer import Tokenizer
    from overleap.checkpoint import load, locate
    from overleap.checkpoint.manifest import read_manifest

    folder = locate(name)
    with screen.bar("verifying weights", "B") as bar:
        model = load(folder, wide=cache_format_of(cache_format) == "wide", progress=bar)
    manifest = read_manifest(folder)
    digest = "" if manifest is None else manifest.digest
    return Opened(model, Tokenizer.from_folder(folder), profile_for(folder), digest)


def _engine(
    opened: Opened,
    tokens: int,
    memory: str | None,
    cache_format: str = "release",
    disk: Any = None,
) -> Any:
    """An engine with room for one text of `tokens` tokens; says what memory that will take."""
    from overleap.engine.budget import budget, parse_bytes
    from overleap.engine.engine import Engine

    form, limit = cache_format_of(cache_format), None if memory is None else parse_bytes(memory)
    fits = budget(opened.model.config, tokens, form, memory_bytes=limit)
    screen.note(
        f"predicted peak memory {size(fits.peak_bytes)}: {size(fits.resident_bytes)} "
        f"now, {size(fits.cache_bytes)} cache for {tokens:,} tokens, "
        f"{size(fits.scratch_bytes)} scratch"
    )
    return Engine(
        opened.model,
        pages=fits.pages,
        slots=fits.slots,
        format=form,
        chunk_tokens=fits.chunk_tokens,
        model_digest=opened.digest,
        disk=disk,
    )


def _reply(
    opened: Opened, engine: Any, prompt: Any, sampling: Any, echo: bool, branch: int = 0
) -> Any:
    """Read the prompt under a bar, then stream the reply's events to stdout if `echo`.

    branch   tokens after which other prompts may differ
    returns  (Reply, Finish of the engine)
    """
    from overleap.chat.replies import ReplyStream, collect
    from overleap.engine.request import Progress, Request, Token

    stream, decoder = ReplyStream(prompt.reply), opened.tokenizer.decoder()
    ids = opened.tokenizer.encode_prompt(prompt)
    request = Request(prompt=ids, sampling=sampling, branches=(branch,))
    handle, events = engine.submit(request), []
    with screen.bar("reading", "tokens") as bar:
        coming = engine.stream(handle)
        for event in coming:
            if isinstance(event, Progress):
                bar(event.done, event.total)
            else:
                break
        else:
            event = None
    while event is not None:
        if isinstance(event, Token):
            events += _show(stream.push(decoder.push(event.id)), echo)
            if stream.done:
                engine.abort(handle)
        event = next(coming, None)
    assert handle.finish is not None
    if handle.finish.error is not None:
        raise handle.finish.error
    rest = decoder.flush()
    reason: Literal["length", "stop"] = "length" if handle.finish.reason == "length" else "stop"
    events += _show([*(stream.push(rest) if rest else []), *stream.finish(reason)], echo)
    if echo:
        sys.stdout.write("\n")
    return collect(events), handle.finish


def _show(events: list[Any], echo: bool) -> list[Any]:
    from overleap.chat.replies import ContentDelta, ReasoningDelta, ToolCallDelta, ToolCallStart

    for event in events if echo else []:
        if isinstance(event, ContentDelta):
            sys.stdout.write(event.text)
        elif isinstance(event, ReasoningDelta):
            screen.talk.print(event.text, style="dim", end="", markup=False)
        elif isinstance(event, ToolCallStart):
            sys.stdout.write(f"\n[call {event.name}] ")
        elif isinstance(event, ToolCallDelta):
            sys.stdout.write(event.arguments)
    sys.stdout.flush()
    return events


def _memory_line(engine: Any, usage: Any) -> str:
    """Tokens read, cache, seconds, speed and peak memory of one answer, for people."""
    from overleap.cache import layout

    stats, config, form = engine.stats(), engine.model.config, engine.format
    fixed = layout.slot_bytes(config, form).total
    read = usage.prompt_tokens - usage.cached_tokens
    growth = (usage.cache_bytes - fixed) / max(1, usage.prompt_tokens + usage.generated_tokens)
    decode = max(0, usage.generated_tokens - 1) / usage.decode_s if usage.decode_s else 0.0
    peak = stats.peak_process_bytes
    parts = [
        f"{read:,} tokens read"
        + (f" ({usage.cached_tokens:,} cached)" * bool(usage.cached_tokens)),
        f"cache {size(usage.cache_bytes)}: {growth:,.0f} B a token, {size(fixed)} fixed",
        f"{usage.prefill_s + usage.decode_s:.1f} s",
        f"decode {decode:.1f} tokens/s",
        f"peak memory {size(peak)}" if peak else "",
    ]
    return " · ".join(part for part in parts if part)


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
    keep: Keep = True,
    cache_dir: CacheDir = None,
    cache_space: CacheSpace = CACHE_SPACE,
    as_json: Json = False,
) -> None:
    """Read files whole and answer a question about them.

    What was read is kept on disk: the next question about the same files is answered at once.

    Example: `overleap ask README.md "What is the project called?"`
    """
    from overleap.chat.dialects import ask_prompt
    from overleap.engine.request import Sampling

    text = "\n\n".join(text_of(name).rstrip() for name in files)
    opened = _open(model, cache)
    prompt = ask_prompt(text, question, opened.profile, thinking=thinking, effort=effort)
    tokens = len(opened.tokenizer.encode_prompt(prompt))
    disk = open_disk(context, opened.digest, keep, cache_dir, cache_space)
    engine = _engine(opened, tokens + max_tokens, memory, cache, disk)
    sampling = Sampling(temperature=temperature, seed=seed, max_tokens=max_tokens)
    branch = max(0, tokens - len(opened.tokenizer.encode(question)) - AROUND_QUESTION)
    reply, finish = _reply(opened, engine, prompt, sampling, not as_json, branch)
    if as_json:
        screen.put_json(
            {"reply": asdict(reply), "usage": asdict(finish.usage), "seed": finish.seed}
        )
    screen.note(_memory_line(engine, finish.usage))
    note_trouble(engine)


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
    keep: Keep = True,
    cache_dir: CacheDir = None,
    cache_space: CacheSpace = CACHE_SPACE,
) -> None:
    """Talk with a model. An empty line or end of input leaves, /new starts over.

    Example: `overleap chat --model ./my-checkpoint --temperature 0`
    """
    from overleap.chat.dialects import render_chat
    from overleap.engine.request import Sampling

    opened = _open(model)
    disk = open_disk(context, opened.digest, keep, cache_dir, cache_space)
    engine = _engine(opened, tokens, memory, disk=disk)
    sampling = Sampling(temperature=temperature, seed=seed, max_tokens=max_tokens)
    messages: list[dict[str, Any]] = []
    for line in _lines():
        if line == "/new":
            messages = []
            continue
        said = [*messages, {"role": "user", "content": line}]
        try:
            prompt = render_chat(said, profile=opened.profile, thinking=thinking, effort=effort)
            reply, finish = _reply(opened, engine, prompt, sampling, echo=True)
        except OverleapError as error:
            screen.show_error(error)
            continue
        answer = {"role": "assistant", "content": reply.content}
        if reply.reasoning:
            answer["reasoning_content"] = reply.reasoning
        messages = [*said, answer]
        screen.note(_memory_line(engine, finish.usage))
    note_trouble(engine)


def _lines() -> Iterator[str]:
    """What the user types, until an empty line or the end."""
    while True:
        if sys.stdin.isatty():
            screen.talk.print("[bold]you:[/] ", end="")
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


@app.command()
def generate(
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
    as_json: Json = False,
) -> None:
    """Continue a text, without any chat format.

    Example: `overleap generate "def main(" --max-tokens 64 --temperature 0`
    """
    from overleap.engine.request import Request, Sampling, Token

    opened = _open(model, cache)
    text = text_of("-") if prompt == "-" else prompt
    ids = [opened.tokenizer.bos_id, *opened.tokenizer.encode(text)]
    engine = _engine(opened, len(ids) + max_tokens, memory, cache)
    sampling = Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        max_tokens=max_tokens,
    )
    handle, decoder = (
        engine.submit(Request(prompt=ids, sampling=sampling)),
        opened.tokenizer.decoder(),
    )
    pieces = []
    for event in engine.stream(handle):
        if isinstance(event, Token):
            pieces.append(decoder.push(event.id))
            if not as_json:
                sys.stdout.write(pieces[-1])
                sys.stdout.flush()
    pieces.append(decoder.flush())
    if handle.finish.error is not None:
        raise handle.finish.error
    if as_json:
        finish = asdict(handle.finish)
        screen.put_json(
            {"text": "".join(pieces)} | {k: finish[k] for k in ("reason", "seed", "usage")}
        )
    else:
        sys.stdout.write(pieces[-1] + "\n")
    screen.note(_memory_line(engine, handle.finish.usage))


@app.command()
def demo(
    context: typer.Context,
    tokens: Annotated[int, typer.Option(help="Length of the document.", min=256)] = 16384,
    facts: Annotated[int, typer.Option(help="Facts to plant.", min=1)] = 8,
    seed: Seed = None,
    model: Model = "mini",
    memory: Memory = None,
    keep: Keep = False,
    cache_dir: CacheDir = None,
    cache_space: CacheSpace = CACHE_SPACE,
    as_json: Json = False,
) -> None:
    """Read a long real text with facts planted in it, then ask about them.

    Example: `overleap demo --tokens 65536 --seed 7`
    """
    from overleap.cache import layout
    from overleap.eval.recall import ANSWER_TOKENS, document, questions

    seed = secrets.randbelow(2**31) if seed is None else seed
    opened, began = _open(model), time.perf_counter()
    planted = document(opened.tokenizer, tokens, facts, seed)
    disk = open_disk(context, opened.digest, keep, cache_dir, cache_space)
    engine = _engine(opened, tokens + ANSWER_TOKENS, memory, disk=disk)
    answers = []
    with screen.bar(f"reading {tokens:,} tokens", "tokens") as bar:
        for answer in questions(
            engine, opened.tokenizer, opened.profile, planted, lambda p: bar(p.done, p.total)
        ):
            answers.append(answer)
    right, read = sum(answer.right for answer in answers), answers[0].usage
    seconds = time.perf_counter() - began
    per_token = layout.bytes_per_token(opened.model.config, layout.CacheFormat.RELEASE)
    before = layout.previous_bytes_per_token(opened.model.config)
    if as_json:
        screen.put_json(
            {
                "seed": seed,
                "tokens": read.prompt_tokens,
                "right": right,
                "facts": facts,
                "seconds": seconds,
                "cache_bytes": read.cache_bytes,
                "formula_bytes_per_token": per_token,
                "previous_generation_bytes_per_token": before,
                "peak_process_bytes": engine.stats().peak_process_bytes,
                "answers": [asdict(answer) | {"right": answer.right} for answer in answers],
            }
        )
        return
    rows = [
        (a.fact.question, f"{a.fact.depth:.0%}", a.fact.value, a.reply, "yes" if a.right else "NO")
        for a in answers
    ]
    title = f"{right} of {facts} right · {read.prompt_tokens:,} tokens · seed {seed}"
    screen.put_table(title, ("question", "depth", "planted", "answer", "right?"), rows)
    print(_memory_line(engine, read))
    print(
        f"formula: {per_token:,.1f} B of cache a token, a V3.2-style cache of this geometry takes "
        f"{before:,.0f} B ({before / per_token:.1f} times) · all in all {seconds:.1f} s"
    )
