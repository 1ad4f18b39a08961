"""Training a draft for an mlx-lm target."""

from dflash_mlx.training.evaluation import Evaluation
from dflash_mlx.training.plan import Plan
from dflash_mlx.training.run import Training, train
from dflash_mlx.training.trainer import StepReport

__all__ = ["Evaluation", "Plan", "StepReport", "Training", "train"]
