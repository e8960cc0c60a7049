"""All that differs from database to database, and from driver to driver.

* `database`: one engine, its system, its driver; the names of all systems and drivers
* `system`: what each database has to say
* `driver`: what each driver has to say
* `postgresql`: PostgreSQL, asyncpg, psycopg
* `mariadb`: MariaDB, MySQL, asyncmy, aiomysql
* `sqlite`: SQLite, aiosqlite
* `distributed`: CockroachDB, YugabyteDB
* `levels`: isolation levels, and their order
* `failures`: what an error means
* `interrupt`: stops a statement that was cancelled
* `self_wait`: a task that waits for itself
* `writer_queue`: SQLite's writers, first come first served
"""
