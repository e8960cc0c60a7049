"""One physical transaction.

* `transaction`: where it stands, whether SQL may be sent, and which calls may join
* `phase`: new, active, committing, sent, ending, ended
* `doom`: why it may not commit, and which savepoint heals that
* `hooks`: hooks, dropped with their savepoint
* `reports`: what its connection reports
* `raw_calls`: what user code sends on the driver's own connection
* `statement_kind`: what a statement does, by its text
* `committing`: what is checked before COMMIT is sent, and when it was answered
* `failing`: which failure it has met, and whether it can begin again
* `refusals`: what to say when it takes no SQL
* `tainted`: objects that no later unit may take over
* `times`: how long it waits, idles and commits
"""
