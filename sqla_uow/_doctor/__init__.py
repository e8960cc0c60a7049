"""What a database really gives.

* `examine`: runs the checks
* `subject`: what a check is given
* `trials`: isolation levels, tried
* `report`: what was found
* `url`: what of a URL may be printed
* `postgresql`: what PostgreSQL is asked
* `mariadb`: what MariaDB is asked
* `sqlite`: what SQLite is asked
* `policies`: row level security, tried
* `idempotency`: what each of them is asked about keys
"""
