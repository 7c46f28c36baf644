"""One interface for every way to score examples: assay's own methods, the field's baselines, and simple heuristics.

`scores(task)` gives `[questions, N]`, positive where the example is held to lower the question's loss; a score that
knows nothing of the questions has one row.
"""

from assay.evaluate.baselines.base import Scorer, Scores, score, unavailable
from assay.evaluate.baselines.gradients import Cosine, DotProduct, GradientNorm, TracIn
from assay.evaluate.baselines.knn import KNNShapley
from assay.evaluate.baselines.own import Adjoint, Embeddings, Influence, InRun, SelfInfluence
from assay.evaluate.baselines.retraining import RetrainingShapley
from assay.evaluate.baselines.similarity import FeatureSimilarity, TextSimilarity
from assay.evaluate.baselines.simple import FinalLoss, Given, Random
from assay.evaluate.baselines.trak import Trak
from assay.evaluate.baselines.words import BM25

__all__ = [
    "BM25",
    "Adjoint",
    "Cosine",
    "DotProduct",
    "Embeddings",
    "FeatureSimilarity",
    "FinalLoss",
    "Given",
    "GradientNorm",
    "InRun",
    "Influence",
    "KNNShapley",
    "Random",
    "RetrainingShapley",
    "Scorer",
    "Scores",
    "SelfInfluence",
    "TextSimilarity",
    "TracIn",
    "Trak",
    "score",
    "unavailable",
]
