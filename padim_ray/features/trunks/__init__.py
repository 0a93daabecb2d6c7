"""The pretrained CNNs that a trunk can be taken from."""
