"""What the results come to: groups of runs, tables and figures."""
