"""The class-center head: margins and the sharded softmax."""
