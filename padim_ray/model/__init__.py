"""Models: their specification, their versions on storage, the detector and `PadimModel`."""
