"""What a command knows before weights are read: the text side of a checkpoint, and what fits.

No torch, so that what does not fit is refused at once. Not here: the formulas (engine/budget.py,
cache/layout.py). Read next: session.py (the model, once it is known to fit).
"""

from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from overleap import machine
from overleap.cache import layout
from overleap.cache.layout import CacheFormat
from overleap.cli.app import cache_format_of
from overleap.config import ModelConfig
from overleap.engine.budget import NO_WEIGHTS, Budget, budget, parse_bytes
from overleap.errors import CapacityError, OverleapError, RequestError
from overleap.plan.mapped import Weights, mapped_weights

# Resident memory of the process once torch is imported: no build takes less; what the CPU build
# takes. Weights come on top; those that are unpacked and widened grow by so much at most.
LEAST_RESIDENT, USUAL_RESIDENT = 192 * 2**20, 256 * 2**20
WIDE_GROWTH = 8
SPARED = 10  # without a limit, one part in so many of what is free is not filled with experts
TEXT_BYTES = 450  # of memory for each token of a text that was tokenized
SLICE, SLICE_SLACK = 2**18, 16  # characters counted at a time; tokens a cut may add at most


@dataclass(frozen=True)
class Front:
    """All of a checkpoint but its weights.

    tokenizer, profile  of chat.tokenizer and chat.profiles
    """

    folder: Path
    config: ModelConfig
    tokenizer: Any
    profile: Any

    @property
    def weight_bytes(self) -> int:
        """Size of its weight files."""
        # A link to nothing is complained of where it is opened.
        files = self.folder.glob("*.safetensors")
        return sum(path.stat().st_size for path in files if path.is_file())


def open_front(name: str) -> Front:
    """Config, tokenizer and chat profile of a folder, a hub id or `mini`.

    Raises CheckpointError and ConfigError. A hub id may be fetched first, weights included.
    """
    from overleap.chat.profiles import profile_for
    from overleap.chat.tokenizer import Tokenizer

    folder = _folder(name)
    config = ModelConfig.from_checkpoint(folder)
    return Front(folder, config, Tokenizer.from_folder(folder), profile_for(folder))


def _folder(name: str) -> Path:
    """As checkpoint.locate, which imports torch; that is asked for what is not at hand."""
    here = Path(name)
    if name == "mini":
        here = Path(__file__).parents[1] / "bundled" / "mini"
    with suppress(OSError):  # locate says what is wrong with it
        if name and here.is_dir():
            return here
    from overleap.checkpoint import locate

    return locate(name)


@dataclass(frozen=True)
class Room:
    """What a command may take.

    limit   bytes for the whole process, or of an accelerator; None: what is free
    verify  answers are computed a second time, in a cache of their own
    device  as devices.find() takes it
    """

    cache_format: CacheFormat
    limit: int | None
    verify: bool
    device: str = "cpu"

    @classmethod
    def of(cls, cache_format: str, memory: str | None, verify: bool, device: str = "cpu") -> "Room":
        """From options as they were typed. Raises RequestError and CapacityError."""
        limit = None if memory is None else parse_bytes(memory)
        return cls(cache_format_of(cache_format), limit, verify, device)

    def second_bytes(self, config: ModelConfig, tokens: int) -> int:
        """What checking an answer takes beside the engine's cache."""
        return layout.cache_bytes(config, tokens, self.cache_format).total if self.verify else 0

    def fit(
        self,
        config: ModelConfig,
        tokens: int,
        resident_bytes: int | None = None,
        text_bytes: int = 0,
        native: bool = False,
        slots: int = 2,
        weights: Weights = NO_WEIGHTS,
    ) -> Budget:
        """Room for texts of `tokens` tokens in all; its resident_bytes include second_bytes.

        resident_bytes  of the process when the engine is made; as it is now if not given
        native          as for layout.scratch_bytes
        text_bytes      that will come on top for each token, minded in that largest context
        weights         as for budget()
        Raises CapacityError naming the largest context that fits.
        """
        now, limit, spared = machine.resident_bytes(), self.limit, 0
        if limit is None:
            free = machine.free_bytes()
            limit, spared = (1 << 62, 0) if free is None else (now + free, free // SPARED)
        before = now if resident_bytes is None else resident_bytes

        def fitting(tokens: int, text_bytes: int = text_bytes) -> Budget:
            def within(memory_bytes: int) -> Budget:
                return budget(
                    config,
                    tokens,
                    self.cache_format,
                    memory_bytes=memory_bytes,
                    native=native,
                    slots=slots,
                    resident_bytes=before + text_bytes * tokens + self.second_bytes(config, tokens),
                    weights=weights,
                )

            found = within(limit)
            bounded = found.expert_bytes < weights.expert_bytes
            return within(limit - spared) if bounded and spared else found

        try:
            return fitting(tokens, 0)
        except CapacityError as error:
            refusal = error.message
        largest = _largest(fitting, min(tokens, config.max_position_embeddings))
        raise CapacityError(
            refusal + ", the second computation of --verify included" * self.verify,
            f"a context of {largest} tokens fits"
            if largest
            else "no context fits beside the weights",
        )

    def beside(self, config: ModelConfig, tokens: int, slots: int) -> int:
        """Bytes that a run likes to have beside its weights, on whatever device they are."""
        second = self.second_bytes(config, tokens)
        form, most = self.cache_format, 1 << 62
        return budget(
            config, tokens, form, memory_bytes=most, slots=slots, resident_bytes=second
        ).peak_bytes

    def fit_on(
        self,
        free_bytes: int | None,
        config: ModelConfig,
        tokens: int,
        *,
        held_bytes: int,
        slots: int = 2,
        weights: Weights = NO_WEIGHTS,
    ) -> Budget:
        """As `fit`, for a run on an accelerator; its resident_bytes are those there.

        free_bytes  of the accelerator, None where nothing tells
        held_bytes  of weights that it has already
        weights     that stayed on the host, and what they take there
        """
        may = 1 << 62 if free_bytes is None else held_bytes + free_bytes
        found = budget(
            config,
            tokens,
            self.cache_format,
            memory_bytes=may if self.limit is None else min(may, self.limit),
            slots=slots,
            resident_bytes=held_bytes + self.second_bytes(config, tokens),
        )
        host = machine.free_bytes()
        given = weights.expert_bytes if host is None else max(0, host - host // SPARED)
        return replace(found, expert_bytes=min(given, weights.expert_bytes))

    def expect(self, front: Front, tokens: int, text_bytes: int = TEXT_BYTES) -> None:
        """Refuse now what cannot fit later, before torch is imported and weights are read.

        text_bytes  of memory that each token will take before the engine is made

        Raises CapacityError, or RequestError for more positions than the model has.
        """
        config = front.config
        if self.device == "cpu":  # what another device has, torch tells
            self._expect_memory(front, tokens, text_bytes)
        if tokens > config.max_position_embeddings:
            raise RequestError(
                f"prompt and answer take {tokens} positions, the model has "
                f"{config.max_position_embeddings}",
                f"a context of {config.max_position_embeddings} is the most",
            )

    def _expect_memory(self, front: Front, tokens: int, text_bytes: int) -> None:
        config, wide = front.config, self.cache_format is CacheFormat.WIDE
        mapped = NO_WEIGHTS if wide else mapped_weights(config, front.weight_bytes)
        # Plain weights may be converted when they are read, to half their bytes or twice.
        sure = mapped if config.quantization_config is not None else NO_WEIGHTS
        try:
            self.fit(config, tokens, LEAST_RESIDENT, native=True, weights=sure)
        except CapacityError:
            # Its numbers leave out text and some weights. They belong into what a person is told.
            before = USUAL_RESIDENT + wide * WIDE_GROWTH * front.weight_bytes
            self.fit(config, tokens, before, text_bytes, native=True, weights=mapped)
            raise

    def expect_text(self, front: Front, text: str, answer_tokens: int) -> None:
        """As `expect`, for a text whose tokens nobody has counted, and only as far as needed."""
        try:
            return self.expect(
                front, len(text.encode("utf-8", "replace")) + answer_tokens
            )  # a token is a byte or more
        except OverleapError:
            pass
        counted = answer_tokens
        for end in range(SLICE, len(text) + SLICE, SLICE):
            counted += len(front.tokenizer.encode(text[end - SLICE : end]))
            try:
                self.expect(front, max(0, counted - SLICE_SLACK * (end // SLICE)))
            except OverleapError as error:
                if end >= len(text):
                    raise
                part = f"the first {end:,} of {len(text):,} characters are too much already: "
                raise type(error)(part + error.message, error.hint) from None


def _largest(fitting: Callable[[int], Budget], tokens: int) -> int:
    """The most tokens in whole pages, of so many, that `fitting` does not refuse."""

    def refused(pages: int) -> bool:
        try:
            fitting(pages * layout.PAGE_TOKENS)
        except CapacityError:
            return True
        return False

    pages = range(1, tokens // layout.PAGE_TOKENS + 1)
    return bisect_left(pages, True, key=refused) * layout.PAGE_TOKENS
