"""What a step learns from: phases, weights, losses and labels, and the presets that combine them."""
