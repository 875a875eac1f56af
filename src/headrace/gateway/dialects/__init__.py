"""Wire formats, one file each: a body becomes a core value here, events become bytes, and nothing else is decided."""
