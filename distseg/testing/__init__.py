"""Test kit: real ranks, the trainer as a user starts it, drawn dermoscopy images."""
