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
* `pytest_kit`: all of this for the database of one test
* `pytest_types`: the types of the pytest fixtures
"""
