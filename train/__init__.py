"""Programs launched from a checkout: fetching, training, evaluation, the demo. Never installed."""
