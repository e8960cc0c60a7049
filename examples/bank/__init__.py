"""A bank under load: transfers, deposits and on-call swaps, thousands at once, and what must be true afterwards.

Run it from a checkout: ``python -m examples.bank --help``.  Read `work`, then `services` and, for comparison, `plain`.
"""
