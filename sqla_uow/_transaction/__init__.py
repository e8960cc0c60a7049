"""One physical transaction.

* `transaction`: where it stands, and whether SQL may be sent
* `phase`: new, active, ending, over
* `hooks`: hooks, dropped with their savepoint
* `doom`: why it may not commit, and which savepoint heals that
"""
