"""`compressor`: a toolkit that takes a language model from a checkpoint to a served artifact.

Importing this package imports nothing heavy; every floor of the house is a sub-package of its own
(see docs/architecture.md).
"""

__version__ = "0.1.0"
