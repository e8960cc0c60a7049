"""What a program calls.

* `transactional`: the decorator
* `manager`: `UnitOfWorkManager`
* `current`: `current_session()`, `current_unit()`, the hook functions
"""
