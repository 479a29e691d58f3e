"""Measure a compressed model against its original: paired, with intervals, three-state verdicts.

statistics   intervals and tests (bootstrap, Wilson, McNemar, Holm, power)
divergence   perplexity ratio, KL, top-1 agreement on the same tokens
tasks        accuracy per item through lm-eval
gate         measured values against limits: pass, fail or inconclusive
report       report.html and report.json
"""
