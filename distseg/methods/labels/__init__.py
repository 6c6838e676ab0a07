"""Which label a noisy pixel is given: one file a kind, its config beside its code."""
