"""What turns gradients into parameters."""
