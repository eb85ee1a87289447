"""The demo: a long real text with facts planted in it, read whole, and what the model answers.

Not here: the text and the facts (eval/recall.py), how a request is served (session.py).
"""

import secrets
import time
from dataclasses import asdict
from typing import Annotated, Any

import typer

from overleap.cache import layout
from overleap.cli import screen
from overleap.cli.app import (
    CACHE_SPACE,
    CacheDir,
    CacheSpace,
    Device,
    Json,
    Keep,
    Memory,
    Model,
    Seed,
    Verify,
    app,
)
from overleap.cli.kept import Keeping, note_trouble
from overleap.cli.room import Room, open_front
from overleap.cli.session import Session, import_torch, open_session
from overleap.machine import size

DOCUMENT_BYTES = 1200  # of memory for each token: the document is cut from a longer text


@app.command()
def demo(
    context: typer.Context,
    tokens: Annotated[int, typer.Option(help="Length of the document.", min=256)] = 131072,
    facts: Annotated[int, typer.Option(help="Facts to plant.", min=1)] = 8,
    seed: Seed = None,
    model: Model = "mini",
    memory: Memory = None,
    device: Device = "cpu",
    keep: Keep = False,
    cache_dir: CacheDir = None,
    cache_space: CacheSpace = CACHE_SPACE,
    verify: Verify = False,
    as_json: Json = False,
) -> None:
    """Read a long real text with facts planted in it, then ask about them.

    With --verify the whole text is read once more for each fact.

    Example: `overleap demo --tokens 65536 --seed 7`
    """
    room = Room.of("release", memory, verify, device)
    keeping = Keeping.of(keep, cache_dir, cache_space)
    front, began = open_front(model), time.perf_counter()
    room.expect(front, tokens, DOCUMENT_BYTES)
    import_torch()
    from overleap.eval.recall import ANSWER_TOKENS, document

    seed = secrets.randbelow(2**31) if seed is None else seed
    planted = document(front.tokenizer, tokens, facts, seed)
    session = open_session(context, front, room, tokens + ANSWER_TOKENS, keeping)
    answers, checks = _ask(session, planted)
    found = _facts(session, answers, checks)
    found |= {"seed": seed, "facts": facts, "seconds": time.perf_counter() - began}
    if as_json:
        screen.put_json(found)
    else:
        _show(session, answers, found)
    note_trouble(session.engine)


def _ask(session: Session, planted: Any) -> tuple[list[Any], list[dict[str, Any]]]:
    """Ask about every fact, greedily, in a prompt of its own; the document is read once.

    Returns Answers, and what checking each of them found where that was asked for.
    """
    from overleap.chat.dialects import ask_prompt
    from overleap.engine.request import Request, Sampling
    from overleap.eval.recall import ANSWER_TOKENS, Answer

    tokenizer, text = session.front.tokenizer, planted.text.rstrip()
    sampling = Sampling(temperature=0, max_tokens=ANSWER_TOKENS)
    answers, checks = [], []
    for fact in planted.facts:
        prompt = ask_prompt(text, fact.question, session.front.profile)
        request = Request(prompt=tokenizer.encode_prompt(prompt), sampling=sampling)
        completion = session.complete(request, lambda _: False)
        reply = tokenizer.decode(completion.ids).strip()
        answers.append(Answer(fact, reply, completion.finish.usage))
        check = session.verified(request, completion)
        checks += [] if check is None else [check]
        del prompt, request, completion  # before the next ones are made: a text of any length
    return answers, checks


def _facts(session: Session, answers: list[Any], checks: list[dict[str, Any]]) -> dict[str, Any]:
    """All that was found, for programs."""
    config, read, form = session.model.config, answers[0].usage, session.room.cache_format
    return {
        "tokens": read.prompt_tokens,
        "right": sum(answer.right for answer in answers),
        "cache_bytes": read.cache_bytes,
        "measured_bytes_per_token": session.measured_bytes_per_token(),
        "formula_bytes_per_token": layout.bytes_per_token(config, form),
        "previous_generation_bytes_per_token": layout.previous_bytes_per_token(config),
        "predicted_peak_bytes": session.fits.peak_bytes,
        "peak_process_bytes": session.engine.stats().peak_process_bytes,
        "speculation": session.speculation(),
        "experts": session.experts(),
        "verified": {key: sum(check[key] for check in checks) for key in checks[0]}
        if checks
        else None,
        "answers": [asdict(answer) | {"right": answer.right} for answer in answers],
    }


def _show(session: Session, answers: list[Any], found: dict[str, Any]) -> None:
    """The same for people: a table, and what it took."""
    rows = [
        (a.fact.question, f"{a.fact.depth:.0%}", a.fact.value, a.reply, "yes" if a.right else "NO")
        for a in answers
    ]
    right, tokens, seed = found["right"], found["tokens"], found["seed"]
    title = f"{right} of {found['facts']} right · {tokens:,} tokens · seed {seed}"
    screen.put_table(title, ("question", "depth", "planted", "answer", "right?"), rows)
    print(session.summary(answers[0].usage))
    formula, before = (
        found["formula_bytes_per_token"],
        found["previous_generation_bytes_per_token"],
    )
    print(
        f"cache per token: measured {found['measured_bytes_per_token']:,.1f} B, "
        f"formula {formula:,.1f} B, a V3.2-style cache of this geometry {before:,.0f} B "
        f"({before / formula:.1f} times)"
    )
    print(
        f"predicted peak memory {size(session.fits.peak_bytes)} · "
        f"all in all {found['seconds']:.1f} s"
    )
