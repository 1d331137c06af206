"""Presets: plans files as JSON."""
