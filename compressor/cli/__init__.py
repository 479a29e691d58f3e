"""The `compress` command. Every module here imports lightly; heavy imports are in the bodies."""
