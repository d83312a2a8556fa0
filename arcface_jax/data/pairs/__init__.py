"""Verification sets: pairs of faces, and whether each pair shows one person."""
