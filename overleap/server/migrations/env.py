"""What Alembic runs: the steps, on the connection and in the transaction of database.py.

Not a configuration: there is no alembic.ini and no other way in.
"""

from alembic import context

from overleap.server.database import tables

connection = context.config.attributes["connection"]
# SQLite can undo a CREATE TABLE; Alembic thinks it cannot.
context.configure(connection=connection, target_metadata=tables, transactional_ddl=True)
context.run_migrations()
