"""All that differs from database to database, and from driver to driver.

* `database`: one engine, and what is known of its server
* `levels`: isolation levels, and how each database is told
* `failures`: what an error means
* `driver`: the driver's own connection
* `driver_state`: what a driver knows of its transaction
* `interrupt`: stops a statement that was cancelled
* `self_wait`: a task that waits for itself
* `writer_queue`: SQLite's writers, first come first served
* `distributed`: CockroachDB, YugabyteDB
* `poolers`: prepared statements behind PgBouncer
"""
