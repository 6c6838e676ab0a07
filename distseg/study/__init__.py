"""A study: many runs from one plan, the processes that make them, and what they show together."""
