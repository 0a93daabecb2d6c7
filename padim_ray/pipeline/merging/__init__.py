"""From an actor's partial sums to a group's files: codec, tree, base, reducer."""
