"""Decides among replicas, and reaches other machines."""
