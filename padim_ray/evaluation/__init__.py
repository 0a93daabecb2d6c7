"""How well defects were found, and how far two models agree."""
