"""Version columns.

* `kinds`: integer, UUID, timestamp, xmin
* `mapping`: the mixins
* `reading`: of which moment a version in memory is
* `rows`: reads and locks versions
* `events`: what a flush tells
* `bulk`: UPDATE in bulk
* `bulk_statement`: how such a statement is made to count
* `follows`: `__version_follows__`
* `expectations`: what one unit knows of versions
* `expect`: `expect_version()`, `get_versioned()`, `touch()`
"""
