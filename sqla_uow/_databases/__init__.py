"""All that differs from database to database."""
