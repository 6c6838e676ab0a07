"""Making true masks wrong, on purpose and repeatably, to know how well a method copes.

Every noisy mask is a pure function of (true mask or image, kind, parameters, seed, sample id): no order, rank or
machine enters. Distances are compared as integers and random numbers drawn pixel by pixel in raster order, so that no
rounding decides.

One file a kind, its parameters (a section of the config) beside its code; registry.py lists the kinds that draw, and
config.py joins them. A new kind is a file and its lines in registry.py.
"""
