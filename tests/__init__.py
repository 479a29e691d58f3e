"""Tests; a package so that they can share builders under every way of starting pytest."""
