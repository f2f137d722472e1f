"""Measurements of what the plugins do, on real servers: one file per claim."""
