"""Inference: open any model, embed faces, compare them, and embed whole folders."""
