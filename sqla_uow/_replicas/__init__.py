"""Copies that can only be read.

* `position`: positions in the primary's log
* `router`: which replica a reader gets
"""
