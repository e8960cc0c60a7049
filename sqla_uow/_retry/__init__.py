"""The mechanisms of retrying; no unit, no database.

* `policy`: how long to wait
* `budget`: how many retries an outage may cause
* `controller`: how many calls run at once
* `gate`: where the others wait
* `predicates`: functions of the user that must answer at once
"""
