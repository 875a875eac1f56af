"""Measures any OpenAI-compatible server over HTTP, and what a number format costs in quality."""
