"""How likely an embedding is at a cell."""
