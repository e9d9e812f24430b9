"""Training and evaluation of nested classifiers (MRL)."""
