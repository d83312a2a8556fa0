"""Find and fix label errors of a training set with a face recognition model."""
