"""From files to batches: what there is, how it is made wrong, in which order, and the loaders."""
