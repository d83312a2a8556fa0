"""Evaluation protocols beyond pairs: IJB-B/C, retrieval, groups, all pairs."""
