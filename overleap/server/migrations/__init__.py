"""How the tables of database.py came to be, a file a step, run by Alembic when a ledger is opened.

Not a place to edit the past: a change is a new file in versions/. Read next: env.py.
"""
