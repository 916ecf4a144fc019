"""Training: an engine, and one file per recipe."""

from pyvit.train.config import Config
from pyvit.train.engine import train
from pyvit.train.recipe import RECIPES, Recipe

__all__ = ["RECIPES", "Config", "Recipe", "train"]
