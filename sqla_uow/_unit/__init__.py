"""One unit of work.

* `setup`: what the units of one manager share
* `unit`: `UnitOfWork`
* `options`: what a call site asked for, checked
* `join`: joined calls and savepoints
* `commit`: the end that succeeds
* `rollback`: the end that fails
* `ending`: what every end lets go of
* `verify`: what became of a COMMIT whose answer was lost
* `markers`: rows that tell whether a transaction has committed
* `statistics`: what has happened, in numbers
"""
