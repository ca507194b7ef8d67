"""Cached targets: what a teacher said of every replayed view of a training set, on disk."""
