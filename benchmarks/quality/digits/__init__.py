"""Upright digits adapted to rotated and inverted ones: what separates methods in seconds a run, no download."""
