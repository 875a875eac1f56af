"""Plots and pages for people who would rather look than read: SVG and HTML as trees, with nothing outside the file."""
