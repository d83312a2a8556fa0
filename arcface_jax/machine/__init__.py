"""Plan and examine a machine: memory, speed, collectives, input."""
