"""Loops over a loader: training with its guards and logs, and evaluation. They know no method."""
