"""`overleap serve`: what is asked for is served, or refused. The service itself: tests/server."""

import pytest
from typer.testing import CliRunner

from overleap.cli import app
from overleap.cli.serve import CACHE_TOKENS, _sizes
from overleap.errors import RequestError

MOST = 1048576  # positions of the bundled model


@pytest.mark.parametrize(
    ("asked", "cache_tokens", "sizes"),
    [
        (None, None, (CACHE_TOKENS, CACHE_TOKENS)),
        (MOST, None, (MOST, MOST)),
        (MOST - 1, None, (MOST - 1, MOST - 1)),
        (4096, None, (4096, CACHE_TOKENS)),
        (None, 4096, (4096, 4096)),
        (MOST, 2 * MOST, (MOST, 2 * MOST)),
        (None, 2 * MOST, (MOST, 2 * MOST)),
    ],
)
def test_a_context_that_was_asked_for_is_served(
    asked: int | None, cache_tokens: int | None, sizes: tuple[int, int]
) -> None:
    assert _sizes(asked, cache_tokens, MOST) == sizes


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--context", MOST + 1], "1048577 is asked for, the model has 1048576 positions"),
        (["--context", 0], "a context of 0 and a cache of 524288 tokens hold nothing"),
        (["--cache-tokens", 0], "a cache of 0 tokens hold nothing"),
        (["--context", 4096, "--cache-tokens", 512], "does not fit into a cache of 512 tokens"),
    ],
)
def test_what_cannot_be_served_is_refused(arguments: list[object], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        CliRunner().invoke(app, ["serve", *map(str, arguments)], catch_exceptions=False)
