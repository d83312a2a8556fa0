"""Backbones as pure functions on plain dicts of arrays; `registry.build` makes one by name."""
