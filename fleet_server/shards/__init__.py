"""Models that are too big for one device, cut into stages on several."""
