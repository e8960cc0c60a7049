"""One unit of work."""
