"""Sampling: levels, solvers, guidance, clips, and blocks of a long film. The parts know a callable model and a state only."""
