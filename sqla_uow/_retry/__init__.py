"""The mechanisms of retrying; no unit, no database."""
