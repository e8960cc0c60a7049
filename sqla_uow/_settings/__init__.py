"""What each transaction is told before the first statement of the user.

* `sources`: where settings come from, checked where they are written, asked when a unit is opened
* `preamble`: what one transaction is told, and who may join it
* `changes`: which settings a connection comes back with, other than it was taken with
"""
