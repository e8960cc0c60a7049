"""asyncio's tasks and event loops.

* `frames`: the only ContextVar; which task descends from which
* `owner`: which task may use a unit
* `per_loop`: what each event loop has for itself
* `shield`: finish although cancelled
* `callables`: what runs when something is called
"""
