"""What the tests share: cases, models, references, damaged states, processes."""
