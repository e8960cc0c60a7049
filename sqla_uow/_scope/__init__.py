"""What is open here.

* `places`: an activated manager, an open unit
* `scope`: a scope and its read session
* `lookup`: finds them in this context
"""
