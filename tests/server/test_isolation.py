"""Two customers, one cache: what one has read the other cannot find, however equal the prompts.

Both halves are needed: no hits across, and the same customer's hits. With a real engine on the
bundled model, so that what is counted is what was really not computed.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

import overleap
from overleap.cache.disk import DiskTier
from overleap.cache.prefix import name_pages
from overleap.engine.engine import Engine
from overleap.engine.request import Request, Sampling
from overleap.errors import RequestError
from overleap.model.transformer import Transformer
from overleap.server.auth import Customer
from overleap.server.isolation import Isolation
from overleap.server.tiers import Tier

PAIRS = 200
SECRET = "5e" * 32
ALICE, BOB = (Customer(name * 4, name, Tier(name="test")) for name in ("ali", "bob"))


@pytest.fixture(scope="module")
def model() -> Transformer:
    return overleap.load("mini")


def text(draw: random.Random, tokens: int) -> list[int]:
    return [draw.randrange(3, 2000) for _ in range(tokens)]


def asker(engine: Engine, isolation: Isolation) -> Callable[[Customer, list[int]], int]:
    """A function that sends a prompt and returns how many of its tokens were found in the cache."""

    def ask(customer: Customer, prompt: list[int]) -> int:
        realm = isolation.realm(customer, prompt)
        request = Request(
            prompt=prompt, sampling=Sampling(temperature=0, max_tokens=1),
            salt=realm.salt, public_tokens=realm.public_tokens,
        )  # fmt: skip
        return engine.generate(request).finish.usage.cached_tokens

    return ask


def test_two_hundred_pairs(model: Transformer, seed: int) -> None:
    """A and B send the same prompt, then each again: B's first finds nothing, both seconds do."""
    draw = random.Random(seed)
    ask = asker(Engine(model, pages=64), Isolation(SECRET))
    across, again = 0, 0
    for _ in range(PAIRS):
        prompt = text(draw, draw.randint(129, 150))
        first, second = draw.sample([ALICE, BOB], 2)
        ask(first, prompt)
        across += ask(second, prompt) > 0
        again += ask(first, prompt) >= 128 and ask(second, prompt) >= 128
    print(f"{across} of {PAIRS} hits across, {again} of {PAIRS} hits of the same customer")
    assert across == 0
    assert again >= 0.99 * PAIRS


def test_a_public_prefix_is_shared_and_nothing_behind_it(model: Transformer, seed: int) -> None:
    draw = random.Random(seed)
    public = text(draw, 300)
    ask = asker(Engine(model, pages=64), Isolation(SECRET, [text(draw, 40), public]))
    private = text(draw, 200)
    assert ask(ALICE, public + private) == 0
    assert ask(BOB, public + private) == 256, "two whole pages of the 300 tokens"
    assert ask(ALICE, public + private) == ask(BOB, public + private) == 384
    assert ask(BOB, public + text(draw, 200)) == 256
    # Only as far as a prompt really begins with it.
    assert ask(BOB, [*public[:130], *text(draw, 200)]) <= 128
    assert ask(ALICE, private) == 0


def test_on_disk_and_after_a_restart(model: Transformer, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    public, prompt = text(draw, 150), text(draw, 300)
    for restart in range(2):
        with DiskTier(tmp_path / "kept", space_bytes=2**28) as disk:
            engine = Engine(model, pages=64, model_digest="mini", disk=disk)
            ask = asker(engine, Isolation(SECRET, [public]))
            assert ask(ALICE, prompt) == 256 * restart
            assert ask(ALICE, public + prompt) == 384 * restart
    with DiskTier(tmp_path / "kept", space_bytes=2**28) as disk:
        ask = asker(
            Engine(model, pages=64, model_digest="mini", disk=disk), Isolation(SECRET, [public])
        )
        assert ask(BOB, prompt) == 0
        assert ask(BOB, public + prompt) == 128
    with DiskTier(tmp_path / "kept", space_bytes=2**28) as disk:
        ask = asker(Engine(model, pages=64, model_digest="mini", disk=disk), Isolation("00" * 32))
        assert ask(ALICE, prompt) == 0, "another server's secret"


def test_salts() -> None:
    isolation = Isolation(SECRET)
    users = ["", "a", "b", "a\0", "\udcff"]
    salts = {isolation.salt(customer, user) for customer in (ALICE, BOB) for user in users}
    assert len(salts) == 10
    assert isolation.salt(ALICE, "a") == Isolation(SECRET).salt(ALICE, "a")
    assert isolation.salt(ALICE) != Isolation("00" * 32).salt(ALICE)
    # A user's name cannot be made to look like another key's realm.
    split = Customer("ali", "x", ALICE.tier)
    assert isolation.salt(split, "aliali") != isolation.salt(ALICE, "ali")


def test_realms() -> None:
    isolation = Isolation(SECRET, [[1, 2, 3], [1, 2, 4, 5]])
    for prompt, shared in (([1, 2, 3, 9], 3), ([1, 2, 4, 5, 6], 4), ([1, 2], 2), ([9], 0)):
        assert isolation.realm(ALICE, prompt).public_tokens == shared


def test_names_of_public_pages(seed: int) -> None:
    ids = text(random.Random(seed), 600)
    domain = (b"model", b"release")
    for public in range(6):
        mine, other = (name_pages(ids, domain, salt, public) for salt in (b"mine", b"other"))
        assert [one == two for one, two in zip(mine, other, strict=True)] == [
            page < public for page in range(4)
        ]
        for known in range(5):
            assert name_pages(ids, domain, b"mine", public, mine[:known]) == mine
    # The same page is another one where the border lies elsewhere.
    assert len({name_pages(ids, domain, b"mine", public)[3] for public in range(5)}) == 5


def test_more_public_than_there_is() -> None:
    with pytest.raises(RequestError, match="public_tokens is 3, the prompt has 2"):
        Request(prompt=[1, 2], public_tokens=3)
