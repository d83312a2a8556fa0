"""Trained models at work: open any model, embed faces, compare them, whole folders."""
