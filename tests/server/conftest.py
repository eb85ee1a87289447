"""Ledgers for tests: SQLite in a file, and PostgreSQL in a cluster that lives as long as the run.

PostgreSQL refuses to run as root, so root starts it as somebody else. Not here: what is tested.
"""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from overleap.server.database import Database


def _programs() -> Path | None:
    """The folder with initdb and postgres: Debian keeps it off the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


def _somebody() -> str | None:
    """Whom to run PostgreSQL as; None for whoever runs the tests."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path]:
    """The socket folder of a fresh PostgreSQL cluster, reachable through that folder alone."""
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    user = _somebody()
    folder = Path(tempfile.mkdtemp(prefix="ovl-pg-", dir="/tmp"))  # short: sockets have 107 bytes
    if user is not None:
        shutil.chown(folder, user)
    data = str(folder / "data")
    run = {"user": user, "cwd": "/", "stdin": subprocess.DEVNULL}
    # Clients are killed here, never the server, so nothing needs to reach the disk.
    settings = "listen_addresses= max_connections=200 shared_buffers=32MB fsync=off".split()
    try:
        subprocess.run(
            [programs / "initdb", "-D", data, "-U", "overleap", "-A", "trust", "-E", "UTF8"],
            check=True,
            stdout=subprocess.DEVNULL,
            **run,
        )
        with open(folder.with_suffix(".log"), "wb") as log:
            options = [part for setting in settings for part in ("-c", setting)]
            server = subprocess.Popen(
                [programs / "postgres", "-D", data, "-k", str(folder), *options],
                stdout=log,
                stderr=log,
                **run,
            )
        try:
            _wait(folder, server)
            yield folder
        finally:
            server.send_signal(signal.SIGQUIT)  # at once: nobody needs what is in it
            server.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".log").unlink(missing_ok=True)


def _wait(folder: Path, server: "subprocess.Popen[bytes]") -> None:
    for _ in range(300):
        assert server.poll() is None, folder.with_suffix(".log").read_text()
        try:
            psycopg.connect(f"host={folder} user=overleap dbname=postgres").close()
            return
        except psycopg.OperationalError:
            time.sleep(0.1)
    raise AssertionError("PostgreSQL did not start within 30 s")


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a fresh ledger goes: both kinds, one after the other."""
    if request.param == "sqlite":
        return str(tmp_path / "ledger.sqlite3")
    return _fresh(request.getfixturevalue("cluster"))


@pytest.fixture
def postgres(cluster: Path) -> str:
    """Where a fresh ledger on PostgreSQL goes."""
    return _fresh(cluster)


def _fresh(cluster: Path) -> str:
    """The cluster's database, emptied: making one a test takes longer than the test."""
    control = f"host={cluster} user=overleap dbname=postgres"
    with psycopg.connect(control, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return f"postgresql://overleap@/postgres?host={cluster}"


@pytest.fixture
def database(where: str) -> Iterator[Database]:
    """A fresh ledger."""
    opened = Database(where)
    yield opened
    opened.close()
