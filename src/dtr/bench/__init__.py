"""Measurements of speed. Each checks first that what it times is right."""
