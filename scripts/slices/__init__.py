"""What the TPU compiler makes of the engine's whole step on real slices, and the document that says so."""
