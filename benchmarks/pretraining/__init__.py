"""Pre-training runs that can be compared: text, tasks, methods, runs, and the ledger they go to."""
