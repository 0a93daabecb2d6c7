"""From pixels to embeddings: trunks and their fused forms, the grid of cells, the embedder."""
