"""Training and evaluating nested classifiers (MRL)."""
