"""Version columns."""
