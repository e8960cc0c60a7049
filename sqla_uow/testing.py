"""What users test their units of work with.

* `rolled_back` undoes at its end what a test did.
"""

from sqla_uow._testing_rolled_back import rolled_back

__all__ = ["rolled_back"]
