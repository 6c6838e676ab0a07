"""How much each noisy pixel counts: one file a kind, its config beside its code."""
