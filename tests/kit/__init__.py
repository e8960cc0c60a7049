"""Tools for tests of several folders; README.md says what each module is."""
