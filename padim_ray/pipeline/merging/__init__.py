"""From actors' partial sums to a group's files: codec, tree, base, groups, reducer."""
