"""The correlation of similarities with gold scores, as a metric of the `evaluate` library.

This is the only file that imports the library: in the process of a script, `import evaluate` would find
run_scripts/evaluate.py instead.
"""

import datasets
import evaluate
import numpy as np

from .evaluation import correlations


class EmbeddingSimilarity(evaluate.Metric):
    """Spearman and Pearson correlation of predicted similarities with gold scores, as an `evaluate.Metric`.

    A direct instance needs no network: `EmbeddingSimilarity().compute(predictions=..., references=...)`. The result is
    `{"spearman": ..., "pearson": ...}`, 0 if the predictions or the references are constant.
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
