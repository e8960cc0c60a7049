"""Version columns.

* `kinds`: integer, UUID, timestamp, xmin
* `mapping`: the mixins
* `reading`: which moment a version in memory belongs to
* `rows`: reads and locks versions
* `events`: what a flush tells
* `bulk`: UPDATE in bulk, and `next_version()` for upserts
* `bulk_statement`: makes such a statement set new versions
* `follows`: `__version_follows__`
* `expectations`: what one unit knows of versions
* `expect`: `expect_version()`, `get_versioned()`, `touch()`
"""
