"""Asks what would happen: the same scheduler in virtual time on modelled hardware. No torch, no Ray, no HTTP."""
