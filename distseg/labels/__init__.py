"""The label model: what a pixel's label most probably is."""
