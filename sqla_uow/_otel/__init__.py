"""OpenTelemetry.

* `spans`: of calls, attempts and COMMITs
* `metrics`: of calls; gauges of a manager
"""
