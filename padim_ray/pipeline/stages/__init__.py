"""The stages that images pass through: decode, actors, commit, draw, count."""
