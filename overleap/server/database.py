"""The database of keys and usage: its tables, how it is opened, and who of its users is alive.

SQLite in a file or PostgreSQL, through SQLAlchemy Core. Not what is written into it: auth.py and
ledger.py. Read next: migrations/versions, which make these tables.
"""

import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import sqlalchemy.dialects.postgresql as postgresql
import sqlalchemy.dialects.sqlite as sqlite
from alembic import command
from alembic.config import Config
from sqlalchemy.engine import URL, Connection, Engine, make_url

from overleap.errors import LedgerError

BUSY_MS = 15_000  # how long a transaction waits for other writers
OPENING_MS = 30_000  # and while the tables are made, for who may be making them
STATEMENT_MS = 30_000  # that a statement on PostgreSQL may take
_MIGRATING = 0x4F564C31  # advisory lock of PostgreSQL while tables are made
_ALIVE = 0x4F56  # class of the advisory locks that living owners hold
# PostgreSQL notices within 25 s that an owner's machine is gone, and we that PostgreSQL's is.
_KEEPALIVE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
_POSTGRES: dict[str, Any] = {
    "connect_timeout": 5,  # seconds
    **_KEEPALIVE,
    "tcp_user_timeout": 15_000,  # for what was sent and is not acknowledged
    "options": " ".join(
        f"-c {name}={value}"
        for name, value in {
            **{f"tcp_{key}": value for key, value in _KEEPALIVE.items()},
            "statement_timeout": STATEMENT_MS,
            "lock_timeout": BUSY_MS,
        }.items()
    ),
}

_ONE_STATE: dict[str, Any] = {"isolation_level": "REPEATABLE READ"}

tables = sa.MetaData()
# created_us and its like are microseconds since 1970; money is nano-units of the currency.
keys = sa.Table(
    "keys",
    tables,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("user", sa.String(256), nullable=False),
    sa.Column("tier", sa.String(64), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),  # SHA-256 of the secret part
    sa.Column("created_us", sa.BigInteger, nullable=False),
    sa.Column("revoked_us", sa.BigInteger),
    sa.Column("credited", sa.BigInteger, nullable=False),  # paid in or granted, ever
    sa.Column("charged", sa.BigInteger, nullable=False),  # of settled requests, ever
    sa.Column("reserved", sa.BigInteger, nullable=False),  # of open requests
)
entries = sa.Table(  # one row a request
    "entries",
    tables,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("key_id", sa.String(32), sa.ForeignKey("keys.id"), nullable=False),
    sa.Column("tier", sa.String(64), nullable=False),
    sa.Column("owner", sa.BigInteger, nullable=False),  # the process that serves it
    sa.Column("state", sa.String(8), nullable=False),  # open, settled, refunded
    sa.Column("day", sa.String(10), nullable=False),  # of created_us, UTC
    sa.Column("created_us", sa.BigInteger, nullable=False),
    sa.Column("closed_us", sa.BigInteger),
    sa.Column("reserved_tokens", sa.BigInteger, nullable=False),
    sa.Column("reserved", sa.BigInteger, nullable=False),
    # Prices a token as they were: a later change rewrites no history.
    sa.Column("price_cache_hit", sa.BigInteger, nullable=False),
    sa.Column("price_cache_miss", sa.BigInteger, nullable=False),
    sa.Column("price_output", sa.BigInteger, nullable=False),
    sa.Column("cache_hit_tokens", sa.BigInteger, nullable=False),
    sa.Column("cache_miss_tokens", sa.BigInteger, nullable=False),
    sa.Column("output_tokens", sa.BigInteger, nullable=False),
    sa.Column("machine_us", sa.BigInteger, nullable=False),
    sa.Column("charge", sa.BigInteger, nullable=False),
    sa.Column("cost_hardware", sa.BigInteger, nullable=False),
    sa.Column("cost_power", sa.BigInteger, nullable=False),
    sa.Column("cost_other", sa.BigInteger, nullable=False),
    sa.Index("entries_by_key", "key_id", "created_us"),
    sa.Index("entries_by_time", "created_us"),
    sa.Index(
        "entries_open",
        "key_id",
        sqlite_where=sa.text("state = 'open'"),
        postgresql_where=sa.text("state = 'open'"),
    ),
)
windows = sa.Table(  # computed tokens of a key in a day or month
    "windows",
    tables,
    sa.Column("key_id", sa.String(32), sa.ForeignKey("keys.id"), primary_key=True),
    sa.Column("period", sa.String(10), primary_key=True),  # 2026-11-24 or 2026-11
    sa.Column("used", sa.BigInteger, nullable=False),
    sa.Column("reserved", sa.BigInteger, nullable=False),
)
owners = sa.Table(  # processes that serve; a row without its lock is a process that died
    "owners",
    tables,
    sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("started_us", sa.BigInteger, nullable=False),
)
secrets_table = sa.Table(
    "secrets",
    tables,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("value", sa.String(64), nullable=False),
)


class Database:
    """An opened database with all its tables, brought up to date.

    where   a path, `sqlite:///path` or `postgresql://user@host/name`
    secret  32 bytes drawn when the tables were made, the same for all processes: salts of caches

    Raises LedgerError where it cannot be opened, or was made by a newer version.
    """

    def __init__(self, where: str) -> None:
        url = _url(where)
        self.shown = url.render_as_string(hide_password=True)
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self._locks: Path | None = None
        if self.is_sqlite:
            self._locks = _prepare(Path(url.database or ""))
        with self.reporting("opened"):
            self.engine = _engine(url)
            try:
                self.secret = self._migrate()
            except BaseException:
                self.engine.dispose()
                raise

    def close(self) -> None:
        """Close every connection that is idle."""
        self.engine.dispose()

    @contextmanager
    def reporting(self, what: str) -> Iterator[None]:
        """A block in which an error of the database becomes a LedgerError."""
        try:
            yield
        except sa.exc.SQLAlchemyError as error:
            cause = getattr(error, "orig", None) or error
            first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            raise LedgerError(f"the ledger {self.shown} cannot be {what}: {first}") from error

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state and holds nobody up."""
        options = {"reads_only": True} if self.is_sqlite else _ONE_STATE
        with self.reporting("read"), self.engine.connect() as connection:
            yield connection.execution_options(**options)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction: all of it, or nothing where the block raises."""
        with self.reporting("written"), self.engine.begin() as connection:
            yield connection

    def insert_missing(self, connection: Connection, table: sa.Table, row: dict[str, Any]) -> None:
        """Put a row in unless one with its primary key is there."""
        insert = sqlite.insert if self.is_sqlite else postgresql.insert
        connection.execute(insert(table).values(row).on_conflict_do_nothing())

    def _migrate(self) -> str:
        """Bring the tables up to date, one process at a time, in one transaction."""
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        patient = self.engine.execution_options(busy_ms=OPENING_MS)
        with patient.begin() as connection:
            if not self.is_sqlite:
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = {OPENING_MS}")
                connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATING)))
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except Exception as error:
                if "Can't locate revision" not in str(error):
                    raise
                raise LedgerError(
                    f"the ledger {self.shown} was made by a newer version of Overleap",
                    "update Overleap, or use another ledger",
                ) from None
            found = connection.scalar(
                sa.select(secrets_table.c.value).where(secrets_table.c.name == "cache")
            )
            if found is None:
                found = secrets.token_hex(32)
                connection.execute(secrets_table.insert().values(name="cache", value=found))
        return str(found)

    # Owners: a process that serves holds a lock that its death releases, however it dies.

    def take_lock(self, owner: int, connection: Connection) -> Callable[[], None]:
        """Hold the lock of an owner. Returns how to let go of it.

        connection  what holds it on PostgreSQL: the lock ends with this connection
        """
        if self._locks is None:
            taken = connection.scalar(sa.select(sa.func.pg_try_advisory_lock(_ALIVE, owner)))
            connection.commit()
            assert taken, owner
            return lambda: None
        path = self._locks / str(owner)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

        def release() -> None:
            with suppress(FileNotFoundError):
                path.unlink()
            os.close(file)

        return release

    def is_dead(self, owner: int, connection: Connection) -> bool:
        """True where nobody holds the lock of an owner, and nobody will."""
        if self._locks is None:
            free = sa.select(sa.func.pg_try_advisory_xact_lock(_ALIVE, owner))
            return bool(connection.scalar(free))
        try:
            file = os.open(self._locks / str(owner), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(file)
        return True

    def forget_lock(self, owner: int) -> None:
        """Remove what is left of a dead owner's lock."""
        if self._locks is not None:
            with suppress(FileNotFoundError):
                (self._locks / str(owner)).unlink()


def _url(where: str) -> URL:
    if "://" not in where:
        return URL.create("sqlite", database=where)
    try:
        url = make_url(where)
    except sa.exc.ArgumentError:
        raise LedgerError(f"{where!r} is neither a path nor a database URL") from None
    if url.get_backend_name() == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        raise LedgerError(
            f"a ledger cannot be kept in {url.render_as_string(hide_password=True)}",
            "give a path, or postgresql://user@host/name",
        )
    return url


def _prepare(path: Path) -> Path:
    """Make the file for its user alone. Returns the folder of the owners' locks.

    It lies beside the file itself, wherever links to that lie: all who share the file find it.
    """
    path = Path(os.path.realpath(path))
    locks = path.with_name(path.name + "-owners")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        locks.mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise LedgerError(f"the ledger {path} cannot be made: {error.strerror}") from None
    return locks


def _engine(url: URL) -> Engine:
    if url.get_backend_name() == "postgresql":
        try:
            return sa.create_engine(
                url, pool_pre_ping=True, hide_parameters=True, connect_args=_POSTGRES
            )
        except ImportError:
            raise LedgerError(
                "PostgreSQL needs the package psycopg, which is not installed",
                "pip install 'overleap[postgres]'",
            ) from None
    engine = sa.create_engine(
        url, hide_parameters=True, connect_args={"timeout": OPENING_MS / 1000}
    )

    @sa.event.listens_for(engine, "connect")
    def configure(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say, not where it guesses
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A writer waits for the lock here, not half-way, where waiting could not help it.
        options = connection.get_execution_options()
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {options.get('busy_ms', BUSY_MS)}")
        connection.exec_driver_sql("BEGIN" if options.get("reads_only") else "BEGIN IMMEDIATE")

    return engine
