"""What a labelled pixel costs: one file a kind, its config beside its code."""
