"""What `sqla_uow` costs, measured: ``python -m benchmarks NAME --database ...``."""
