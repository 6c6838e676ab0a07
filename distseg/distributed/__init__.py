"""Processes, what they say to each other, and the DeepSpeed engine that they share."""
