"""Which masks are wrong, and where, by a network and by how each annotator errs."""
