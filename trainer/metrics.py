"""The correlation of similarities with gold scores as a metric of the `evaluate` library.

Nothing else here imports that library: in a script's process, run_scripts/evaluate.py would be found under its name.
"""

import datasets
import evaluate
import numpy as np

from .evaluation import correlations


class EmbeddingSimilarity(evaluate.Metric):
    """Spearman and Pearson correlation of predicted similarities with gold scores, as an `evaluate.Metric`.

    Instantiated directly, it needs no network: `EmbeddingSimilarity().compute(predictions=..., references=...)`.
    """

    def _info(self):
        features = datasets.Features(
            {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
        )
        return evaluate.MetricInfo(
            description="Spearman and Pearson correlation of cosine similarities with gold scores.",
            citation="",
            inputs_description="predictions: similarities; references: gold scores.",
            features=features,
        )

    def _compute(self, predictions, references):
        return correlations(np.asarray(predictions), np.asarray(references))
