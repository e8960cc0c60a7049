"""One unit of work.

* `setup`: what the units of one manager share; makes their transactions
* `unit`: `UnitOfWork`
* `options`: what a call site asked for, checked
* `join`: joined calls and savepoints
* `commit`: the end that succeeds
* `rollback`: the end that fails
* `ending`: what every end lets go of
* `verify`: settles an unknown COMMIT
* `statistics`: what has happened, in numbers
"""
