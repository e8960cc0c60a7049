"""A bank as a web service: transfers, deposits and edits, many at once, and what must be true afterwards.

Run it from a checkout: ``python -m examples.bank --help``.  Read `models`, `services`, `problems` and
`web`; `migrations`; for comparison, `plain`.  What runs it is in `runner`.
"""
