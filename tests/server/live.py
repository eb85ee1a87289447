"""A whole server in a thread of the test: real sockets, a real engine, a model with a script.

`scripted` answers from a script and reads its text back from the cache, so hits, chunks and
snapshots are the true ones; `bundled` is the small trained model.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from overleap.cache.layout import CacheFormat
from overleap.chat.profiles import profile_named
from overleap.chat.tokenizer import Tokenizer
from overleap.checkpoint import load
from overleap.config import ModelConfig
from overleap.engine.choices import Choices
from overleap.engine.engine import Engine
from overleap.plan import Load
from overleap.plan import running as running_plan
from overleap.server import app, wire
from overleap.server.auth import create_key
from overleap.server.costs import load_costs
from overleap.server.database import Database
from overleap.server.serve import Parts, assemble, listen
from overleap.server.service import Service
from overleap.server.settings import Settings
from overleap.server.tiers import Tiers, load_tiers
from overleap.server.turns import Model
from tests.engine.fake import CONFIG, FakeModel

MINI = Path(__file__).parents[2] / "overleap" / "bundled" / "mini"
TOKENIZER = Tokenizer.from_folder(MINI)
NAME = "test-model"

Script = Callable[[str], str]  # the text of a prompt -> what is answered, special tokens spelled


class ScriptedModel(FakeModel):
    """Answers from a script. The prompt ends where the last <｜Assistant｜> and its opening do."""

    def __init__(self, script: Script, vocab_size: int = TOKENIZER.vocab_size) -> None:
        super().__init__()
        self.config = replace(CONFIG, vocab_size=vocab_size, max_position_embeddings=2**17)
        self.script = script
        self.delay_s = 0.0
        self.gate: threading.Semaphore | None = None  # a step takes one of it
        self._answers: dict[str, list[int]] = {}

    def __call__(self, *given: Any, **named: Any) -> Any:
        if self.gate is not None:
            self.gate.acquire()
        if self.delay_s:
            threading.Event().wait(self.delay_s)
        return super().__call__(*given, **named)

    def logits(self, ids: list[int]) -> torch.Tensor:
        start = self._start(ids)
        prompt, said = TOKENIZER.decode(ids[:start], control=True), ids[start:]
        if prompt not in self._answers:
            self._answers[prompt] = TOKENIZER.encode(self.script(prompt), special=True)
        answer = self._answers[prompt]
        right = answer[len(said)] if said == answer[: len(said)] and len(said) < len(answer) else 1
        logits = torch.linspace(0, -1, self.config.vocab_size)
        logits[right] = 30.0
        return logits

    def _start(self, ids: list[int]) -> int:
        assistant, think, end = (
            TOKENIZER.id_of(t) for t in ("<｜Assistant｜>", "<think>", "</think>")
        )
        if assistant not in ids:  # no chat: the prompt ends with its last line
            (line_end,) = TOKENIZER.encode("\n")
            return len(ids) - ids[::-1].index(line_end) if line_end in ids else 1
        start = len(ids) - ids[::-1].index(assistant)
        if ids[start : start + 1] in ([think], [end]):
            start += 1
        opened = TOKENIZER.encode("\n\n<｜DSML｜tool_calls>\n", special=True)
        return start + len(opened) if ids[start : start + len(opened)] == opened else start


@dataclass(eq=False)
class Live:
    """A running server."""

    service: Service
    url: str
    database: Database
    tiers: Tiers
    loop: asyncio.AbstractEventLoop
    server: wire.Server
    clients: dict[Any, Any] = field(default_factory=dict)

    def client(self, kind: Any, **fields: Any) -> Any:
        """A client of a vendor's library, closed with the server."""
        name = kind, tuple(sorted(fields.items()))
        if name not in self.clients:
            self.clients[name] = kind(max_retries=0, timeout=60, **fields)
        return self.clients[name]

    def key(self, tier: str = "pro", user: str = "someone") -> str:
        return create_key(self.database, self.tiers, user=user, tier=tier)[1]

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(setattr, self.server, "should_exit", True)


@contextmanager
def live(
    folder: Path,
    make: Callable[[], Engine],
    *,
    profile: str = "v4-flash",
    context: int = 2**16,
    slots: int = 8,
    vocab_size: int | None = None,
    tiers: Path | None = None,
    needs_keys: bool = False,
    **settings: Any,
) -> Iterator[Live]:
    """Serve until the block ends."""

    @contextmanager
    def engine() -> Iterator[Engine]:
        yield make()

    database, table = Database(str(folder / "ledger.sqlite")), load_tiers(tiers)
    if needs_keys:
        create_key(database, table, user="first", tier="admin")
    chosen = Settings(model=NAME, port=0, **{"drain_s": 1.0, **settings})
    listening = listen(chosen)
    service = assemble(
        Parts(
            settings=chosen,
            model=Model(TOKENIZER, profile_named(profile), context, 1, "fp_test", vocab_size),
            engine=engine,
            slots=slots,
            database=database,
            tiers=table,
            costs=load_costs(),
            needs_keys=needs_keys,
            plan=running_plan(Load(ModelConfig.from_checkpoint(MINI), context)),
        )
    )
    loop, made = asyncio.new_event_loop(), threading.Event()
    server = wire.Server(wire.config_of(app.build(service), chosen), service)

    def run() -> None:
        asyncio.set_event_loop(loop)
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(server.serve(sockets=[listening]))
        made.set()

    thread = threading.Thread(target=run, name="server")
    thread.start()
    running: Live | None = None
    try:
        while not server.started:
            assert not made.wait(0.01), "the server did not start"
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        running = Live(service, url, database, table, loop, server)
        yield running
    finally:
        for client in running.clients.values() if running else ():
            client.close()
        if thread.is_alive():
            loop.call_soon_threadsafe(setattr, server, "should_exit", True)
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"
        database.close()


def scripted(
    script: Script,
    *,
    pages: int = 512,
    slots: int = 8,
    vocab_size: int = TOKENIZER.vocab_size,
    delay_s: float = 0.0,
    gate: threading.Semaphore | None = None,
) -> Callable[[], Engine]:
    """Makes engines whose model answers from a script.

    vocab_size  of the model, which may have more ids than the tokenizer
    delay_s     that a step takes at least; gate: every step takes one of it
    """

    def make() -> Engine:
        model = ScriptedModel(script, vocab_size)
        model.delay_s, model.gate = delay_s, gate
        return Engine(
            model,  # type: ignore[arg-type]
            pages=pages,
            slots=slots,
            format=CacheFormat.WIDE,
            speculate="off",
            model_digest="script",
        )

    return make


def bundled(*, pages: int = 512, slots: int = 8) -> Callable[[], Engine]:
    """Makes engines of the bundled model."""

    def make() -> Engine:
        model = load(MINI)
        return Engine(model, pages=pages, slots=slots, model_digest="mini", choices=Choices(model))

    return make
