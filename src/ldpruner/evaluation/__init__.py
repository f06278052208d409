"""How good generated samples are, by published metrics, each of which says what it was computed with."""

from ldpruner.evaluation import captions, coverage, frechet, kernel, labels, paired  # noqa: F401  (they file their metrics)
from ldpruner.evaluation.base import METRICS
from ldpruner.evaluation.engine import Evaluation, Figure, evaluate
from ldpruner.evaluation.features import FEATURE_NETS, FeatureNet

__all__ = ["FEATURE_NETS", "METRICS", "Evaluation", "FeatureNet", "Figure", "evaluate"]
