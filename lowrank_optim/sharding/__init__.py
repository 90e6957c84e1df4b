"""Parameters that lie on several processes: the only room that knows DTensor and process groups."""
