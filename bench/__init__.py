"""What is timed, against whom, and how the figures are written down. ``python3 run.py bench`` lists the benchmarks."""
