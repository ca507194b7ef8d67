"""Student as it is trained: its tap, the adapter on it, and merging both into the plain model."""
