"""Synthetic faces: identities generated from a seed, for training and testing without a
download.
"""
