"""Copies that can only be read."""
