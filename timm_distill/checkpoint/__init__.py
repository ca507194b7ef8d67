"""Checkpoints: files that survive a crash, what they hold, and how a run resumes from them."""
