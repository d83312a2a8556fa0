"""Services of the machine for a run: devices, processes, signals, files, metrics, the terminal."""
