"""What all clients embed, and the comparison of their vectors with those of `model.encode`."""

from pathlib import Path

import numpy as np

TEXTS = [
    "a man plays the guitar on a stage",
    "someone is playing an instrument",
    "two dogs run across the green field",
    "A long text is cut at the longest input of the model. " * 30,
]


def report(folder: str, vectors) -> None:
    """Print the shape and the lengths of the vectors, and their largest difference from those of the model."""
    vectors = np.asarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=1)
    line = f"{vectors.shape}, lengths {lengths.min():.6f} to {lengths.max():.6f}"
    reference = np.load(Path(folder).parent / "reference.npy")
    if vectors.shape == reference.shape:
        line += f", largest difference {np.abs(vectors - reference).max():.1e}"
    print(line)
