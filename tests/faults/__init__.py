"""Bad inputs as data: one row per fault, with a builder and what the user must be told."""
