"""The same model with torch: readable, the oracle of the native kernels, what runs everywhere and on CUDA. Nothing here
is imported before it is needed: torch takes seconds."""
