"""The commands of `arcface-jax`, one module each; they parse before they import anything heavy."""
