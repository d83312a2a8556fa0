"""Synthetic faces: identities drawn from a seed, to train and verify on without any download."""
