"""What traffic looks like: readers of recorded traffic, and laws to make some up. Values and pure functions only."""
