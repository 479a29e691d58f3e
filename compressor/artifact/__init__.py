"""What lies on disk: layer formats, packing, writing, reading back, verifying."""
