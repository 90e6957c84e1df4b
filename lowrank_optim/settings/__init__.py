"""What a parameter group may hold: its values, its keys, the numbers of its parts, its plan."""
