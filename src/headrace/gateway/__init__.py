"""Speaks to clients: the only room with a web framework. Sees core.ports.Service and nothing deeper."""
