"""One step of an optimizer, from its groups to the written weights."""
