"""What starts, serves, fills, loads and audits the bank: no part of how a service is written with sqla-uow."""
