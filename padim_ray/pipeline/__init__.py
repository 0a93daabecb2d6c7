"""The distributed jobs: everything that imports Ray."""
