"""Single-device networks."""
