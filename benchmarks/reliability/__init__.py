"""Checks that a server stays up, each with a goal and a measured figure; `python -m reliability` runs them."""
