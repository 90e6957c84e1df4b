"""Parameters on several processes: the only package that knows DTensor and process groups."""
