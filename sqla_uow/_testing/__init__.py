"""The kit that users test with.

* `rolled_back`: a test's work, undone at its end
* `savepoints`: transactions that are savepoints of that test's
* `faults`: a database that fails where you say
* `errors`: the errors it fails with
* `cancel`: a call cancelled at each of its awaits
* `captures`: hooks that are collected
* `twice`: functions that are run in vain first
* `queries`: statements, counted
* `statements`: which of them are a program's own
* `leaks`: connections that did not come back
* `pytest_kit`: the same for the database of a test
* `pytest_types`: for type checkers
"""
