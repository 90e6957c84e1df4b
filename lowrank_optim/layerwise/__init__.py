"""Updates of single parameters, from hooks of a trainer or inside the backward pass."""
