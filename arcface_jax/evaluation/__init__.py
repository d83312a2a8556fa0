"""Verification: embeddings of image pairs, insightface's ten-fold protocol, and plots."""
