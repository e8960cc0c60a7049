"""What we tell SQLAlchemy, and what it tells us.

* `maker`: makes the sessions of units over one engine
* `session`: the session of a unit
* `savepoint`: `begin_nested()` in a unit
* `engine`: takes the connection of a unit
* `connection`: reports errors, sends COMMIT, hands out the driver's own connection
* `connection_events`: what events tell of statements and savepoints
* `pool`: what is set on a connection, and what it must be when it comes back
* `streams`: rows that are fetched as they are read
* `instances`: which objects may come in
* `watched_session`: lazy loads that are counted or refused
* `load_origin`: why a SELECT is sent
* `load_advice`: what to write instead
"""
