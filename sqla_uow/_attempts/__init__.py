"""Run the body, and again if need be.

* `call`: the attempts of one call: how many, the waits between them, what the last failure becomes
* `attempt`: one run: a unit begins and ends
* `arguments`: what an attempt used up, and how the next one gets it back
* `loop`: whether the end of a block leads back to its loop
* `observers`: tells them
"""
