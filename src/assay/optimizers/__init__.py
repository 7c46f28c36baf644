"""The optimizer's own step as a linear function of the gradient that it receives.

One short file per family holds the update in the symbols of the ``torch.optim`` documentation;
:func:`model_of` picks the one that fits an optimizer, or refuses by name.
"""

from assay.optimizers.model import OptimizerModel, Split
from assay.optimizers.select import model_of, unwrapped

__all__ = ["OptimizerModel", "Split", "model_of", "unwrapped"]
