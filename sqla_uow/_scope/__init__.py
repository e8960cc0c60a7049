"""What is open here.

* `places`: an activated manager, an open unit
* `scope`: a scope
* `read_session`: its read session, and how that gives way
* `lookup`: finds them in this context
"""
