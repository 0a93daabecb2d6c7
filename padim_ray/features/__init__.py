"""From pixels to embeddings: trunks, their fused forms, the grid of cells, the embedder."""
