"""Idempotency keys: a row of the unit's own transaction, so that it is there if, and only if, the work is.

* `table`: the table, and which row a key has
* `statements`: the SQL, where databases differ
* `claim`: take a key, look at it, note what came of it
* `keys`: `IdempotencyKeys`, which a program has
* `once`: a function whose result is kept with the key
* `purge`: remove what has expired; `command`: as a program
"""
