"""What a method is made of: feed, projector, rule, residual, storage."""
