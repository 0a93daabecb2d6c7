"""The jobs: everything that imports ray."""
