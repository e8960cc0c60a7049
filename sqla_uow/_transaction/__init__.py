"""One physical transaction."""
