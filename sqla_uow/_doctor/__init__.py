"""What a database really gives."""
