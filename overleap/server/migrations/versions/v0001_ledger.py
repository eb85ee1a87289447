"""The first tables: keys, entries, windows, owners, secrets.

Not what they mean: database.py.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

BIG = sa.BigInteger
ZEROED = (
    "cache_hit_tokens cache_miss_tokens output_tokens machine_us charge "
    "cost_hardware cost_power cost_other"
).split()


def upgrade() -> None:
    """Make them."""
    op.create_table(
        "keys",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("user", sa.String(256), nullable=False),
        sa.Column("tier", sa.String(64), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("created_us", BIG, nullable=False),
        sa.Column("revoked_us", BIG),
        *(sa.Column(name, BIG, nullable=False) for name in ("credited", "charged", "reserved")),
    )
    op.create_table(
        "entries",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("key_id", sa.String(32), sa.ForeignKey("keys.id"), nullable=False),
        sa.Column("tier", sa.String(64), nullable=False),
        sa.Column("owner", BIG, nullable=False),
        sa.Column("state", sa.String(8), nullable=False),
        sa.Column("day", sa.String(10), nullable=False),
        sa.Column("created_us", BIG, nullable=False),
        sa.Column("closed_us", BIG),
        sa.Column("reserved_tokens", BIG, nullable=False),
        sa.Column("reserved", BIG, nullable=False),
        sa.Column("price_cache_hit", BIG, nullable=False),
        sa.Column("price_cache_miss", BIG, nullable=False),
        sa.Column("price_output", BIG, nullable=False),
        *(sa.Column(name, BIG, nullable=False) for name in ZEROED),
    )
    op.create_index("entries_by_key", "entries", ["key_id", "created_us"])
    op.create_index("entries_by_time", "entries", ["created_us"])
    is_open = sa.text("state = 'open'")
    op.create_index(
        "entries_open", "entries", ["key_id"], sqlite_where=is_open, postgresql_where=is_open
    )
    op.create_table(
        "windows",
        sa.Column("key_id", sa.String(32), sa.ForeignKey("keys.id"), primary_key=True),
        sa.Column("period", sa.String(10), primary_key=True),
        sa.Column("used", BIG, nullable=False),
        sa.Column("reserved", BIG, nullable=False),
    )
    op.create_table(
        "owners",
        sa.Column("id", BIG, primary_key=True, autoincrement=False),
        sa.Column("started_us", BIG, nullable=False),
    )
    op.create_table(
        "secrets",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("value", sa.String(64), nullable=False),
    )
