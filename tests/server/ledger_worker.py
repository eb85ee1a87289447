"""A process that forks users of a ledger, for the tests of races and crashes. Not a test itself.

Reads a line of JSON on stdin for each: where, key, limits, seed, folder, tasks, rounds. It forks a
process that reserves and settles until its quota is used up or its rounds are over, and
prints the process id. A line `wait` collects a dead one and prints its id and how it ended.

In the folder, a file `ready-ID` says that a process has opened the ledger, `done-ID` that it is
through; it begins when there is a file `go`.

The journal gets a line before and after each settlement, in one write each: `will` and `did`.
"""

import asyncio
import json
import os
import random
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from overleap.errors import LedgerError, QuotaError, RateError
from overleap.server.auth import Auth, Customer
from overleap.server.database import Database
from overleap.server.ledger import Ledger
from tests.server.accounts import tiers_of, usage_within

PROMPT, OUTPUT = 900, 100  # tokens of a request at most


async def _work(
    ledger: Ledger, customer: Customer, draw: random.Random, journal: int, rounds: int
) -> None:
    for _ in range(rounds):
        prompt, output = draw.randint(1, PROMPT), draw.randint(1, OUTPUT)
        let_in = False
        try:
            async with ledger.reserve(customer, prompt, output) as reservation:
                let_in = True
                await asyncio.sleep(draw.random() * 0.01)
                if draw.random() < 0.1:
                    continue  # left without being settled: a refund
                usage = usage_within(draw, prompt, output)
                facts = [
                    reservation.id, usage.cache_hit_tokens,
                    usage.cache_miss_tokens, usage.output_tokens,
                ]  # fmt: skip
                os.write(journal, (json.dumps(["will", *facts]) + "\n").encode())
                await reservation.settle(usage)
                os.write(journal, (json.dumps(["did", *facts]) + "\n").encode())
        except QuotaError:
            return
        except RateError:
            await asyncio.sleep(0.01)
        except LedgerError:
            if let_in:
                raise
            # Too many wait for the lock: the client is told to come back, and does.


def work(order: dict[str, Any]) -> None:
    database = Database(order["where"])
    customer = Auth(database, tiers_of(**order["limits"])).identify(order["key"])
    folder = Path(order["folder"])
    journal = os.open(folder / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with Ledger(database) as ledger:
        (folder / f"ready-{os.getpid()}").touch()
        while not (folder / "go").exists():
            time.sleep(0.002)

        async def run() -> None:
            draws = [random.Random(order["seed"] + task) for task in range(order["tasks"])]
            rounds = order["rounds"]
            await asyncio.gather(
                *(_work(ledger, customer, draw, journal, rounds) for draw in draws)
            )

        asyncio.run(run())
        (folder / f"done-{os.getpid()}").touch()
    database.close()


def main() -> None:
    for line in sys.stdin:
        if line.strip() == "wait":
            print(*os.wait(), flush=True)
            continue
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work(order)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        print(child, flush=True)


if __name__ == "__main__":
    main()
