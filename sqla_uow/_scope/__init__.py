"""What is open here."""
