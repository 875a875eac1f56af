"""The words and the clock: values, contracts and time that every other room shares. Standard library only."""
