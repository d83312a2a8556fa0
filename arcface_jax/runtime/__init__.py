"""What a run needs of its machine: devices, processes, signals, files, metrics, the terminal."""
