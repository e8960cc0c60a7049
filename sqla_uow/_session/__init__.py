"""What SQLAlchemy is told, and tells.

* `maker`: makes the sessions of units over one engine
* `session`: the session of a unit
* `savepoint`: `begin_nested()` in a unit
* `connection`: the connection and the engine of a unit, and their events
* `statement_kind`: what a statement does, by its text
* `streams`: rows that are fetched as they are read
* `instances`: which objects may come in
* `watched_session`: lazy loads that are counted or refused
* `load_origin`: why a SELECT is sent
* `load_advice`: what to write instead
"""
