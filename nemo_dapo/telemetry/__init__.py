"""What a run says about itself: typed metrics, the sinks that keep them, the line a human reads."""
