"""Open a checkpoint safely, walk its decoder blocks one at a time, load whole models."""
