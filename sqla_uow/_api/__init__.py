"""What a program calls.

* `transactional`: the decorator
* `manager`: `UnitOfWorkManager`
* `current`: `current_session()`, `current_unit()`, the hook functions
* `proxy`: the current session under one name
* `scoping`: a scope of the manager that is activated
"""
