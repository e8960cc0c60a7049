"""What is open here.

* `places`: an activated manager, an open unit
* `scope`: a scope
* `told`: the read session ends where its settings change
* `read_session`: its read session, and how that gives way
* `lookup`: finds them in this context
"""
