"""Run the body, and again if need be."""
