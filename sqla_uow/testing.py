"""Tools for tests of code that uses units of work.

* `rolled_back` undoes what a test did.
* `capture_after_commit` collects the hooks of the units that commit.
* `count_queries`, `assert_num_queries` and `assert_max_num_queries` count the statements that are sent.
* `assert_no_leaks` checks that all connections come back.
* `FaultPlan` makes a unit meet a failure of its database, as the driver reports it; `cancel_at` cancels a call.
* `run_twice` first runs transactional functions in vain, to show what a rollback does not undo.
"""

from sqla_uow._testing.cancel import cancel_at
from sqla_uow._testing.captures import CapturedHook, capture_after_commit
from sqla_uow._testing.faults import Fault, FaultPlan, FaultPoint
from sqla_uow._testing.leaks import assert_no_leaks
from sqla_uow._testing.queries import Queries, assert_max_num_queries, assert_num_queries, count_queries
from sqla_uow._testing.rolled_back import rolled_back
from sqla_uow._testing.twice import run_twice

__all__ = [
    "CapturedHook",
    "Fault",
    "FaultPlan",
    "FaultPoint",
    "Queries",
    "assert_max_num_queries",
    "assert_no_leaks",
    "assert_num_queries",
    "cancel_at",
    "capture_after_commit",
    "count_queries",
    "rolled_back",
    "run_twice",
]
