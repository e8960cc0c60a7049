"""Run the body, and again if need be.

* `call`: one call: what it was told, what is around it, how far it is
* `attempt`: one run: a unit begins and ends
* `retry_or_raise`: what a failed run becomes
* `arguments`: what an attempt used up, and how the next one gets it back
* `loop`: ``async for attempt in ...``, and whether the end of a block leads back to it
* `observers`: tells observers what happens
"""
