"""`overleap serve`: from options to a service.

Not here: what it does (server/), keys and reports. Read next: server/serve.py.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from overleap.cli import screen
from overleap.cli.accounts import Ledger, TiersFile, ledger_of
from overleap.cli.app import CACHE_SPACE, CacheDir, CacheSpace, Device, Keep, Memory, app
from overleap.cli.kept import Keeping, default_folder
from overleap.cli.preflight import preflight
from overleap.cli.room import Front, Room, open_front
from overleap.cli.session import import_torch, load_model
from overleap.errors import CapacityError, ConfigError, RequestError

SLOTS = 16
CACHE_TOKENS = 524_288  # texts in the cache at once, all requests together


@app.command()
def serve(
    frame: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder, hub id org/name, or `mini`.")] = "mini",
    host: Annotated[str, typer.Option(help="Another address than this machine needs keys.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 takes any that is free.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What requests call the model.")] = None,
    alias: Annotated[list[str] | None, typer.Option(help="Another name for it.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a request at most.")] = None,
    cache_tokens: Annotated[
        int | None, typer.Option(help="Tokens in the cache, all requests together.")
    ] = None,
    slots: Annotated[int, typer.Option(help="Requests served at once.", min=1)] = SLOTS,
    queue: Annotated[int, typer.Option(help="Requests that may wait.", min=0)] = 64,
    wait_seconds: Annotated[
        float, typer.Option(help="A request that would wait longer is refused at once.", min=0)
    ] = 300.0,
    drain_seconds: Annotated[
        float, typer.Option(help="What running answers get when it is told to stop.", min=0)
    ] = 30.0,
    ledger: Ledger = None,
    tiers: TiersFile = None,
    costs: Annotated[Path | None, typer.Option(help="Costs, as costs.toml has them.")] = None,
    keys: Annotated[
        bool, typer.Option("--keys", help="Refuse requests without a key on this machine too.")
    ] = False,
    public_prefix: Annotated[
        Path | None, typer.Option(help="A system prompt whose cache all keys share.")
    ] = None,
    memory: Memory = None,
    device: Device = "cpu",
    keep: Keep = True,
    cache_dir: CacheDir = None,
    cache_space: CacheSpace = CACHE_SPACE,
) -> None:
    """Serve a model over HTTP to OpenAI, DeepSeek and Anthropic clients, and a page to talk with.

    Example: `overleap serve`
    """
    room = Room.of("release", memory, False, device)
    keeping = Keeping.of(keep, cache_dir, cache_space)
    preflight(None if keeping is None else keeping.folder or default_folder())
    front = open_front(model)
    most = front.config.max_position_embeddings
    context, total = _sizes(context, cache_tokens, most)
    room.expect(front, min(total, most))
    import_torch()
    from overleap.server.costs import load_costs
    from overleap.server.database import Database
    from overleap.server.logs import configure
    from overleap.server.serve import Parts, assemble, listen
    from overleap.server.serve import serve as run
    from overleap.server.settings import Settings
    from overleap.server.tiers import load_tiers

    configure(sys.stderr)
    settings = Settings(
        model=name or _name_of(model, front),
        aliases=tuple(alias or ()),
        host=host,
        port=port,
        queue=queue,
        wait_s=wait_seconds,
        drain_s=drain_seconds,
    )
    listening = listen(settings)
    database = Database(ledger_of(ledger))
    weights = _Weights(frame, front, room, total, slots, keeping)
    service = assemble(
        Parts(
            settings=settings,
            model=_text_side(front, context, weights.digest),
            engine=weights.engine,
            slots=slots,
            database=database,
            tiers=load_tiers(tiers),
            costs=load_costs(costs),
            needs_keys=keys,
            public=_public(front, public_prefix),
            plan=_plan(front, context),
        )
    )
    bound = listening.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    screen.note(f"serving {settings.model} on http://{shown}:{bound} (ledger {database.shown})")
    gc.collect()
    gc.freeze()
    run(service, listening)
    database.close()


def _sizes(asked: int | None, cache_tokens: int | None, most: int) -> tuple[int, int]:
    """Tokens of a request and of the cache, from what was asked for and the model's positions."""
    context = most if asked is None else asked
    if context > most:
        raise RequestError(
            f"a context of {context} is asked for, the model has {most} positions",
            f"a context of {most} is the most",
        )
    total = max(CACHE_TOKENS, asked or 0) if cache_tokens is None else cache_tokens
    if context < 1 or total < 1:
        raise RequestError(f"a context of {context} and a cache of {total} tokens hold nothing")
    if asked is not None and asked > total:
        raise RequestError(
            f"a context of {asked} does not fit into a cache of {total} tokens",
            f"leave out --cache-tokens, or make it {asked}",
        )
    return min(context, total), total


class _Weights:
    """The model, loaded now, and the engine, made in the thread that will use it."""

    def __init__(
        self,
        frame: typer.Context,
        front: Front,
        room: Room,
        tokens: int,
        slots: int,
        keeping: Keeping | None,
    ) -> None:
        self._room, self._keeping = room, keeping
        self._loaded = load_model(frame, front, room, tokens, slots)
        self.digest, chunk = self._loaded.digest, self._loaded.fits.chunk_tokens
        if chunk < slots:
            raise CapacityError(
                f"{slots} requests at once need a step of as many tokens, {chunk} fit"
            )

    @contextmanager
    def engine(self) -> Iterator[Any]:
        from overleap.engine.choices import Choices
        from overleap.engine.engine import Engine

        disk, fits = self._disk(), self._loaded.fits
        try:
            yield Engine(
                self._loaded.model,
                pages=fits.pages,
                slots=fits.slots,
                format=self._room.cache_format,
                chunk_tokens=fits.chunk_tokens,
                snapshot_bytes=fits.snapshot_bytes,
                model_digest=self.digest,
                disk=disk,
                choices=Choices(self._loaded.model),
                resident=self._loaded.resident,
            )
        finally:
            if disk is not None:
                disk.close()

    def _disk(self) -> Any:
        from overleap.cache.disk import DiskTier

        if self._keeping is None or not self.digest:
            return None
        folder = self._keeping.folder or default_folder()
        try:
            return DiskTier(folder, space_bytes=self._keeping.space_bytes)
        except CapacityError as error:
            if self._keeping.folder is not None:
                raise
            screen.note(error.message)
            return None


def _text_side(front: Front, context: int, digest: str) -> Any:
    from overleap import __version__
    from overleap.server.turns import Model

    stamp = int((front.folder / "config.json").stat().st_mtime)
    fingerprint = f"fp_{digest[:12] or 'unnamed'}_{__version__}"
    return Model(
        front.tokenizer, front.profile, context, stamp, fingerprint, front.config.vocab_size
    )


def _name_of(model: str, front: Front) -> str:
    """What requests call it if nobody says: the last part of its name."""
    if model == "mini":
        return "overleap-mini"
    last = Path(model).name or front.folder.name
    if not last:
        raise ConfigError(f"{model!r} gives the model no name", "give it one with --name")
    return last


def _plan(front: Front, context: int) -> dict[str, Any] | None:
    """The plan of this model in this process, its weights loaded; None where nobody can tell."""
    from overleap.plan import Load, running

    try:
        return running(Load(front.config, context))
    except ConfigError as error:
        screen.note(error.message)
        return None


def _public(front: Front, path: Path | None) -> list[list[int]]:
    """The beginning of every chat with this system prompt, up to where the user's words begin."""
    if path is None:
        return []
    from overleap.chat.dialects import render_chat
    from overleap.cli.app import text_of

    prompts = [
        render_chat(
            [{"role": "system", "content": text_of(str(path))}, {"role": "user", "content": "x"}],
            profile=front.profile,
            thinking=thinking,
        )
        for thinking in ([True, False] if front.profile.thinks else [False])
    ]
    return [front.tokenizer.encode_prompt(prompt) for prompt in prompts]
