"""Two keys, one server: nobody finds what another left in the cache, everybody finds his own."""

import json
import random
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.server.live import NAME, live, scripted

PAIRS = 200


def post(url: str, path: str, body: dict[str, Any], key: str) -> dict[str, Any]:
    request = urllib.request.Request(
        url + path,
        json.dumps(body).encode(),
        {"content-type": "application/json", "authorization": f"Bearer {key}"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        found: dict[str, Any] = json.loads(response.read())
    return found


def get(url: str, path: str, key: str) -> dict[str, Any]:
    request = urllib.request.Request(url + path, headers={"authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=60) as response:
        found: dict[str, Any] = json.loads(response.read())
    return found


def test_no_prefix_crosses_from_key_to_key(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    with live(tmp_path, scripted(lambda prompt: "Yes."), needs_keys=True) as server:
        keys = [server.key(user=name) for name in ("one", "two")]

        def cached(key: str, words: list[str], user: str = "") -> int:
            messages = [{"role": "user", "content": " ".join(words)}]
            body = {"model": NAME, "messages": messages, "max_tokens": 4}
            body |= {"thinking": {"type": "disabled"}, **({"user": user} if user else {})}
            usage = post(server.url, "/v1/chat/completions", body, key)["usage"]
            return int(usage["prompt_cache_hit_tokens"])

        def pair(number: int) -> tuple[int, int, int, int]:
            words = [f"{number}", *draw.choices("alpha beta gamma delta".split(), k=200)]
            first = cached(keys[number % 2], words)
            other = cached(keys[1 - number % 2], words)
            again = cached(keys[number % 2], words)
            own_user = cached(keys[number % 2], words, user="somebody")
            return first, other, again, own_user

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(pair, range(PAIRS)))
    assert sum(first > 0 for first, *_ in found) == 0, "texts repeat themselves"
    assert sum(other > 0 for _, other, *_ in found) == 0, "a key found what another had sent"
    assert sum(own_user > 0 for *_, own_user in found) == 0, "a user found another user's"
    hits = sum(again > 0 for _, _, again, _ in found)
    assert hits >= 0.99 * PAIRS, f"only {hits} of {PAIRS} found their own"
