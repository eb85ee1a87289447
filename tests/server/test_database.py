"""Opening ledgers: every step of the migrations, two at once, files that are none, who is alive."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from overleap.errors import LedgerError
from overleap.server.database import Database, tables
from overleap.server.ledger import Ledger

ROOT = Path(__file__).resolve().parents[2]


def test_migrations_make_the_tables_that_are_declared(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, tables) == []


def test_a_ledger_is_opened_again(where: str) -> None:
    first = Database(where)
    secret = first.secret
    first.close()
    second = Database(where)
    assert second.secret == secret and len(bytes.fromhex(secret)) == 32
    second.close()


def test_many_open_a_fresh_one_at_once(where: str) -> None:
    code = (
        "import sys; from overleap.server.database import Database;"
        "print(Database(sys.argv[1]).secret)"
    )
    command = [sys.executable, "-c", code, where]
    running = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    told = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0] * 4
    assert len(told) == 1


def test_a_newer_ledger_is_refused(database: Database, where: str) -> None:
    with database.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(LedgerError, match="newer version"):
        Database(where)


def test_files_that_are_no_ledger(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"not a database" * 1000)
    with pytest.raises(LedgerError, match="not a database"):
        Database(str(path))
    with pytest.raises(LedgerError, match="cannot be made"):
        Database(str(path / "below"))
    with pytest.raises(LedgerError, match="cannot be made"):
        Database(str(tmp_path))


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("sqlite://", "cannot be kept"),
        ("sqlite:///:memory:", "cannot be kept"),
        ("mysql://user:secret@host/name", "cannot be kept"),
        ("://", "neither a path"),
        ("postgresql://nobody:secret@/none?host=/nonexistent", "cannot be opened"),
    ],
)
def test_places_that_are_none(where: str, says: str) -> None:
    with pytest.raises(LedgerError, match=says) as raised:
        Database(where)
    assert "secret" not in str(raised.value)


def test_only_its_user_may_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    database = Database(str(folder / "ledger.sqlite3"))
    with Ledger(database):
        for path in [folder, *folder.rglob("*")]:
            assert path.stat().st_mode & 0o077 == 0, path
    database.close()


def test_sqlite_keeps_what_it_acknowledged(tmp_path: Path) -> None:
    database = Database(str(tmp_path / "ledger.sqlite3"))
    with database.write() as connection:
        assert connection.scalar(sa.text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(sa.text("PRAGMA synchronous")) == 2  # FULL: fsync at each commit
        assert connection.scalar(sa.text("PRAGMA foreign_keys")) == 1
    database.close()


def test_a_transaction_is_all_or_nothing(database: Database) -> None:
    with pytest.raises(ZeroDivisionError), database.write() as connection:
        connection.execute(sa.text("UPDATE secrets SET value = 'x'"))
        raise ZeroDivisionError
    with database.read() as connection:
        assert connection.scalar(sa.text("SELECT value FROM secrets")) == database.secret


def test_a_reader_holds_no_writer_up(database: Database) -> None:
    with database.read() as reading:
        before = reading.scalar(sa.text("SELECT value FROM secrets"))
        with database.write() as connection:
            connection.execute(sa.text("UPDATE secrets SET value = 'x'"))
        assert reading.scalar(sa.text("SELECT value FROM secrets")) == before


def test_who_comes_by_a_link_finds_the_owners(tmp_path: Path) -> None:
    path, link = tmp_path / "ledger.sqlite3", tmp_path / "elsewhere" / "ledger"
    database = Database(str(path))
    link.parent.mkdir()
    link.symlink_to(path)
    other = Database(str(link))
    with Ledger(database) as one, other.read() as connection:
        assert one._books._owner is not None
        assert not other.is_dead(one._books._owner, connection)
    other.close()
    database.close()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite3"
    Database(str(path)).close()
    code = (
        "import os, sys; from overleap.server.database import Database as D;"
        "from overleap.server.ledger import Ledger as L; l = L(D(sys.argv[1]));"
        "print(l._books._owner, flush=True); sys.stdin.read(1); os._exit(0)"
    )
    command = [sys.executable, "-c", code, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout is not None and process.stdin is not None
        owner = int(process.stdout.readline())
        database = Database(str(path))
        with database.read() as connection:
            assert not database.is_dead(owner, connection)
        process.kill()
        process.wait()
        with database.read() as connection:
            assert database.is_dead(owner, connection)
    assert os.path.exists(tmp_path / "ledger.sqlite3-owners" / str(owner))
    with Ledger(database):
        assert not os.path.exists(tmp_path / "ledger.sqlite3-owners" / str(owner))
    database.close()
    with sqlite3.connect(path) as raw:
        assert raw.execute("SELECT count(*) FROM owners").fetchone() == (0,)
    raw.close()
