"""Reading comprehension: a long document with planted facts, and whether an answer is right.

Not here: the facts themselves (needle.py), asking about them (`overleap demo`).
"""

from dataclasses import dataclass

from overleap.chat.tokenizer import Tokenizer
from overleap.engine.request import Usage
from overleap.errors import RequestError
from overleap.eval.needle import Fact, Planted, plant, stdlib_text

ANSWER_TOKENS = 12
PIECE = 2**18  # characters
_RESERVE = 64  # tokens for the question and the chat frame around a document


@dataclass(frozen=True)
class Answer:
    """One question, the reply, and what it took."""

    fact: Fact
    reply: str
    usage: Usage

    @property
    def right(self) -> bool:
        """Whether the reply is the planted value."""
        return self.fact.is_answered_by(self.reply)


def document(tokenizer: Tokenizer, tokens: int, facts: int, seed: int) -> Planted:
    """Standard library text of about `tokens` tokens with `facts` facts at random depths.

    Prompts about it are at most `tokens` long, and rarely more than 2 % shorter.
    Raises RequestError when `tokens` has no room for the facts or exceeds the library's text.
    """
    room = tokens - _RESERVE - 16 * facts
    if room < 64:
        raise RequestError(
            f"{tokens} tokens are too few for {facts} facts and a document",
            f"ask for at least {_RESERVE + 16 * facts + 64}",
        )
    text = stdlib_text(seed)
    cut = _first(tokenizer, text, room)
    return plant(cut[: cut.rfind("\n") + 1], facts, seed)


def _first(tokenizer: Tokenizer, text: str, tokens: int) -> str:
    """The first `tokens` tokens of a text, encoded a piece at a time to spare memory."""
    pieces, have = [], 0
    for start in range(0, len(text), PIECE):
        ids = tokenizer.encode(text[start : start + PIECE])[: tokens - have]
        pieces.append(tokenizer.decode(ids))
        have += len(ids)
        if have == tokens:
            return "".join(pieces)
    raise RequestError(f"the standard library has {have} tokens, {tokens} are needed")
