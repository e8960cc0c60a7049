"""Migrations.

* `operations`: what a migration says
* `policies`: what it says of tenants
* `impl`: what Alembic does by itself to versioned tables
* `autogenerate`: version columns in generated migrations
* `target`: what a table must have first
* `making`: makes and removes triggers
* `run`: one runner at a time; an async `env.py` in one call
* `patience`: DDL on a table in use
* `schema`: how a database's schema is changed, and what a version trigger is
* `databases`: which of the following a dialect needs
* `postgresql`: PostgreSQL's lock, limits and triggers; CockroachDB's, YugabyteDB's
* `mariadb`: MariaDB's, and DDL without transactions
* `sqlite`: SQLite's
"""
