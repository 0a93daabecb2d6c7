"""The jobs: fit, update, forget, merge, score, evaluate, compare."""
