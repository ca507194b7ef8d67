"""Report of a run: predictions compared, figures, the page, and the trackers that are fed while it trains."""
