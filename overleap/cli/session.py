"""A model ready to answer: loading, one request with its bars, checking it, the closing line.

Not here: the commands (talk.py, demo.py), what fits (room.py). Read next: engine/engine.py.
"""

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Literal

import typer

from overleap.cache import layout
from overleap.cli import screen
from overleap.cli.kept import Keeping, note_trouble, open_disk
from overleap.cli.room import Front, Room
from overleap.engine.budget import Budget
from overleap.machine import size
from overleap.plan.mapped import Weights


@dataclass(frozen=True)
class Session:
    """A model with an engine that has room for texts of `tokens` tokens.

    fits  what was predicted before the first token; resident_bytes include second_bytes
    """

    front: Front
    room: Room
    model: Any
    engine: Any
    fits: Budget

    def complete(self, request: Any, push: Callable[[int], bool]) -> Any:
        """Read the prompt under a bar, then hand every token to `push` until it says True: enough.

        Returns the Completion. Raises the error of a request that ended with one.
        """
        from overleap.engine.request import Completion, Progress, Token

        handle, tokens = self.engine.submit(request), []
        coming = self.engine.stream(handle)
        with screen.bar("reading", "tokens") as bar:
            first = next(coming)
            while isinstance(first, Progress):
                bar(first.done, first.total)
                first = next(coming)
        for event in chain([first], coming):
            if isinstance(event, Token):
                tokens.append(event)
                if push(event.id):
                    self.engine.abort(handle)
        if handle.finish.error is not None:
            raise handle.finish.error
        return Completion(tuple(tokens), handle.finish)

    def verified(self, request: Any, completion: Any) -> dict[str, Any] | None:
        """Compute an answer from scratch where --verify asks for it; None where it does not.

        Raises StateError when it comes out otherwise.
        """
        if not self.room.verify:
            return None
        from overleap.engine.verify import check

        began = time.perf_counter()
        with screen.bar("reading again, to verify", "tokens") as bar:
            sound = check(
                self.model,
                request,
                completion,
                format=self.room.cache_format,
                chunk_tokens=self.fits.chunk_tokens,
                progress=bar,
            )
        seconds = time.perf_counter() - began
        even = f", {sound.ties} of them by a choice as good as even" if sound.ties else ""
        screen.note(
            f"verified: computed from scratch in {seconds:.1f} s, "
            f"all {sound.tokens} tokens of the answer are the same{even}"
        )
        return asdict(sound) | {"seconds": seconds}

    def reply(self, reads: Any, ids: list[int], sampling: Any, echo: bool, branch: int) -> "Told":
        """Answer a chat prompt, streaming the reply to stdout if `echo`.

        reads   the ReplyFormat of the prompt
        branch  tokens after which other prompts may differ
        """
        from overleap.chat.replies import ReplyStream, collect
        from overleap.engine.request import Request

        stream, decoder = ReplyStream(reads), self.front.tokenizer.decoder()
        events: list[Any] = []

        def push(token: int) -> bool:
            events.extend(_show(stream.push(decoder.push(token)), echo))
            return stream.done

        request = Request(prompt=ids, sampling=sampling, branches=(branch,))
        completion = self.complete(request, push)
        rest, finish = decoder.flush(), completion.finish
        reason: Literal["length", "stop"] = "length" if finish.reason == "length" else "stop"
        events += _show([*(stream.push(rest) if rest else []), *stream.finish(reason)], echo)
        if echo:
            sys.stdout.write("\n")
        return Told(collect(events), finish, self.verified(request, completion))

    def speculation(self) -> dict[str, Any]:
        """What proposing tokens brought so far, for programs."""
        stats = self.engine.stats()
        done = stats.speculation
        checked, accepted = sum(done.checked), sum(done.accepted)
        steps = stats.generated_tokens - accepted
        return asdict(done) | {
            "acceptance": accepted / checked if checked else None,
            "tokens_per_step": stats.generated_tokens / steps if steps else None,
            "why": _why(done.state, done.gain),
        }

    def experts(self) -> dict[str, Any] | None:
        """What keeping only some experts in memory meant so far; None where all may be there."""
        stats = self.engine.stats().experts
        return None if stats is None else asdict(stats)

    def measured_bytes_per_token(self) -> float:
        """Bytes of the tensors that hold pages, by the tokens that the pages can hold."""
        stats = self.engine.stats()
        slot = layout.slot_bytes(self.model.config, self.room.cache_format).total
        pages: int = stats.allocated_bytes - self.fits.slots * slot
        return pages / float(stats.pages * layout.PAGE_TOKENS)

    def close(self, usage: Any) -> None:
        """What an answer took, and what proposing brought so far, on stderr."""
        screen.note(self.summary(usage))
        note_trouble(self.engine)

    def summary(self, usage: Any) -> str:
        """Tokens read, cache, seconds, speed, peak memory and proposals, for people."""
        config, form = self.model.config, self.room.cache_format
        fixed = layout.slot_bytes(config, form).total
        read = usage.prompt_tokens - usage.cached_tokens
        growth = (usage.cache_bytes - fixed) / max(1, usage.prompt_tokens + usage.generated_tokens)
        decode = max(0, usage.generated_tokens - 1) / usage.decode_s if usage.decode_s else 0.0
        peak = self.engine.stats().peak_process_bytes
        parts = [
            f"{read:,} tokens read"
            + (f" ({usage.cached_tokens:,} cached)" * bool(usage.cached_tokens)),
            f"cache {size(usage.cache_bytes)}: {growth:,.0f} B a token, {size(fixed)} fixed",
            f"{usage.prefill_s + usage.decode_s:.1f} s",
            f"decode {decode:.1f} tokens/s",
            f"peak memory {size(peak)}" if peak else "",
            _kept_experts(self.experts()),
            _proposals(self.speculation()),
        ]
        return " · ".join(part for part in parts if part)


@dataclass(frozen=True)
class Told:
    """A reply, the engine's Finish, and what checking it found (None: it was not asked for)."""

    reply: Any
    finish: Any
    verified: dict[str, Any] | None


@dataclass(frozen=True)
class Loaded:
    """A model where it is to run, before its engine.

    digest    names its weights, empty where nothing does
    fits      what was predicted for a run; resident_bytes include second_bytes
    resident  what bounds the routed experts in memory; None where all of them may be there
    """

    model: Any
    digest: str
    fits: Budget
    resident: Any


def load_model(
    context: typer.Context, front: Front, room: Room, tokens: int, slots: int = 2
) -> Loaded:
    """Load the weights, with a bar while bytes are verified, and say what memory a run will take.

    tokens   of all texts in the cache, their answers included; slots: how many they are
    Raises CapacityError where they do not fit.
    """
    import_torch()
    from overleap import devices
    from overleap.checkpoint import Verified, build, open_checkpoint, placed
    from overleap.checkpoint.manifest import read_manifest
    from overleap.engine.resident import Resident
    from overleap.kernels import shortfall

    config, wide = front.config, room.cache_format == "wide"
    packed = config.quantization_config is not None and not wide
    device = devices.find(room.device, packed)
    with screen.bar("verifying weights", "B") as bar:
        checkpoint, verified = open_checkpoint(front.folder, progress=bar)
    if verified is Verified.HEADERS:
        screen.note(f"weights: {verified}; `overleap models verify` reads every byte")
    model = build(
        checkpoint,
        device=device,
        wide=wide,
        spare_bytes=room.beside(config, tokens, slots),
        memory_bytes=room.limit,
    )
    lying = placed(checkpoint, model)
    manifest = read_manifest(front.folder)
    fits = _fitting(room, model, tokens, slots, lying.weights)
    for why in (shortfall(device.type), _unused(device.type, packed)):
        if why:
            screen.note(why)
    second = room.second_bytes(config, tokens)
    screen.note(_prediction(fits, lying.weights, tokens, slots, second, device))
    resident = None
    if fits.expert_bytes < lying.weights.expert_bytes:
        resident = Resident(model, lying, fits.expert_bytes)
        context.call_on_close(resident.close)
    return Loaded(model, "" if manifest is None else manifest.digest, fits, resident)


def open_session(
    context: typer.Context, front: Front, room: Room, tokens: int, keeping: Keeping | None = None
) -> Session:
    """A model and an engine for it.

    tokens   of the longest text, its answer included
    keeping  where what is read is kept on disk; None for nowhere
    """
    loaded = load_model(context, front, room, tokens)
    from overleap.engine.engine import Engine

    engine = Engine(
        loaded.model,
        pages=loaded.fits.pages,
        slots=loaded.fits.slots,
        format=room.cache_format,
        chunk_tokens=loaded.fits.chunk_tokens,
        snapshot_bytes=loaded.fits.snapshot_bytes,
        model_digest=loaded.digest,
        disk=None if keeping is None else open_disk(context, loaded.digest, keeping),
        resident=loaded.resident,
    )
    return Session(front, room, loaded.model, engine, loaded.fits)


def _fitting(room: Room, model: Any, tokens: int, slots: int, weights: Weights) -> Budget:
    """What a run takes where the model is. Raises CapacityError."""
    from overleap import devices
    from overleap.kernels import native

    config, device = model.config, model.device
    if device.type == "cpu":
        return room.fit(config, tokens, native=native(), slots=slots, weights=weights)
    held = sum(p.nbytes for p in model.parameters() if p.device.type == device.type)
    free = devices.free_bytes(device)
    return room.fit_on(free, config, tokens, held_bytes=held, slots=slots, weights=weights)


def _unused(device: str, packed: bool) -> str:
    """That an accelerator is there which was not asked for and holds such weights; empty else."""
    from overleap import devices

    there = devices.accelerators() if device == "cpu" else []
    found = [kind for kind in there if kind.packed or not packed]
    return f"{found[0].what} is not used: --device {found[0].name} would" if found else ""


def _prediction(
    fits: Budget, weights: Weights, tokens: int, slots: int, second: int, device: Any
) -> str:
    """What a run will take in memory, part by part."""
    on_host = device.type == "cpu"
    whole = fits.expert_bytes == weights.expert_bytes
    mapped = fits.weight_bytes + whole * fits.expert_bytes * on_host
    experts = f"{size(fits.expert_bytes)} for {size(weights.expert_bytes)} of experts"
    peak = fits.peak_bytes - (0 if on_host else fits.expert_bytes)
    parts = [
        f"{size(fits.resident_bytes - second)} {'now' if on_host else 'weights'}",
        f"{size(mapped)} weights still to be read" if mapped else "",
        experts * (on_host and not whole),
        f"{size(fits.cache_bytes)} cache for {tokens:,} tokens"
        + f" of {slots} requests" * (slots > 2),
        f"{size(fits.kept_bytes)} snapshots and text",
        f"{size(fits.scratch_bytes)} scratch",
        f"{size(second)} to verify" if second else "",
    ]
    told = ", ".join(part for part in parts if part)
    where = "" if on_host else f" of {device}"
    apart = f"; on the host {experts}" if not on_host and weights.expert_bytes else ""
    return f"predicted peak memory{where} {size(peak)}: {told}{apart}"


def import_torch() -> None:
    """torch makes so many objects as it is imported that looking for garbage costs 0.2 s."""
    if "torch" in sys.modules:
        return
    gc.disable()
    import torch  # noqa: F401

    gc.enable()
    gc.freeze()


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


def _why(state: str, gain: float | None) -> str:
    """A state of the gate as a reason (see engine/gate.py)."""
    times = "" if gain is None else f", {gain:.2f} times the speed of plain decoding"
    return {
        "none": "the model has no block to propose with",
        "off": "switched off",
        "trial": "on trial: too few answers yet to say whether it pays",
        "on": f"on{times}",
        "paused": f"paused, because it does not pay{times}",
    }[state]


def _kept_experts(facts: dict[str, Any] | None) -> str:
    if facts is None:
        return ""
    uses = max(1, facts["kept"] + facts["ahead"] + facts["missed"])
    kept, ahead, missed = (facts[name] / uses for name in ("kept", "ahead", "missed"))
    right = facts["right"] / max(1, facts["read_ahead"])
    return (
        f"experts: {kept:.0%} in memory, {ahead:.0%} read ahead ({right:.0%} of those read ahead "
        f"were right), {missed:.0%} waited for, {size(facts['read_bytes'])} read, "
        f"{size(facts['resident_bytes'])} of {size(facts['bound_bytes'])} held"
        + " (not bounded: this system takes no advice about memory)"
        * (not facts["bounded"])
    )


def _proposals(facts: dict[str, Any]) -> str:
    checked, why = sum(facts["checked"]), facts["why"]
    if not checked:
        return f"no proposals ({why})"
    return (
        f"{facts['acceptance']:.0%} of {checked} proposals right, "
        f"{facts['tokens_per_step']:.2f} tokens a step ({why})"
    )
