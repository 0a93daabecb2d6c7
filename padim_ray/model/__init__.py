"""A model: its specification, its versions on storage, the detector, `PadimModel`."""
