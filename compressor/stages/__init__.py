"""Model in, model out: one `apply(config, context) -> StageReport` in each file."""
