"""The mechanisms of retrying; no unit, no database.

* `policy`: how long to wait
* `budget`: how many retries an outage may cause
* `groups`: which functions get in each other's way
* `tables`: which tables a statement names
* `controller`: how many calls of a group run at once
* `gate`: where the others wait
* `turn`: the turn of one attempt
* `predicates`: functions of the user that must answer at once
"""
