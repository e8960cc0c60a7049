"""Migrations.

* `operations`: what a migration says
* `impl`: what Alembic does by itself to versioned tables
* `autogenerate`: version columns in generated migrations
* `target`: what a table must have first
* `triggers`: the SQL of version triggers
* `catalog`: finds triggers by their table
* `making`: makes and removes them
* `lock`: one runner at a time
* `patience`: DDL on a table in use
* `postgresql`: triggers of joined children
* `mariadb`: DDL without transactions
* `run`: an async `env.py` in one call
"""
