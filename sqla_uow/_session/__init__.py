"""What SQLAlchemy is told, and tells."""
