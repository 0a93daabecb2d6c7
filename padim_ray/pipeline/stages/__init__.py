"""The stages that images pass: decode, actors, commit, draw, count."""
