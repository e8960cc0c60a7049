"""Clients, processes, pools and a PostgreSQL on paper: the library's own gate and retries in a time that costs nothing.

`virtual` is the clock, `machine` the cores, `serializable` and `server` the database, `client` what a process has, `sides`
who is compared, `run` one situation, `calibration` what is measured for it, and `study` what is asked of it.
"""
