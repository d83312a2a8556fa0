"""The train step and what surrounds it: state, checkpoints, evaluators, diagnostics."""
