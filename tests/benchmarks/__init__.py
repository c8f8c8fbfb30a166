"""What is measured, and how: `python -m tests.benchmarks NAME...`, or `make bench`."""
