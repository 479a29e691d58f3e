"""Serving: one engine loop (schedule, run, sample) behind an OpenAI-compatible HTTP server."""
