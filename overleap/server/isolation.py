"""Whose cached prefixes a request may find: its own key's, and what the operator declared public.

A time to the first token tells whether a prefix was cached, and so whether somebody sent it. So
every page of the cache, in memory and on disk, is named under a salt that only this server can
compute. Not the cache itself (cache/prefix.py). Read next: engine/request.py, `salt` and
`public_tokens`.
"""

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from overleap.server.auth import Customer


@dataclass(frozen=True)
class Realm:
    """What a Request is to carry: `salt` and `public_tokens`."""

    salt: str
    public_tokens: int


class Isolation:
    """Realms of one server, or of several on one ledger.

    secret  of the ledger (Database.secret): the same after a restart, so that the disk tier still
            finds what it kept
    public  prompts' beginnings, as token ids, that everybody may share: a system prompt rendered
            as the chat format renders it
    """

    def __init__(self, secret: str, public: Sequence[Sequence[int]] = ()) -> None:
        self._secret = bytes.fromhex(secret)
        self._public = [tuple(ids) for ids in public]

    def realm(self, customer: Customer, prompt: Sequence[int], user_id: str = "") -> Realm:
        """The realm of a prompt.

        user_id  the customer's own user, as the request names it: it only divides the customer's
                 realm further, never joins another's
        """
        shared = max((_common(prompt, ids) for ids in self._public), default=0)
        return Realm(self.salt(customer, user_id), shared)

    def salt(self, customer: Customer, user_id: str = "") -> str:
        """A name for what this customer sent; nobody can choose or guess another's."""
        digest = hmac.new(self._secret, digestmod=hashlib.sha256)
        for part in (customer.key_id.encode(), user_id.encode("utf-8", "surrogateescape")):
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading ids two prompts share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
