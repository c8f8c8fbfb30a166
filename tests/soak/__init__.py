"""What takes too long for a test: `make soak`."""
