"""The step of each method, checkpoints, and the trainer that composes everything."""
