"""Uses a trained encoder: load it from anywhere, embed, predict, detect, inspect and export.

Start at `aps.load` (`aps.inference.load`). Planning never imports this package. It does not know how stages train, nor
rules; only `serving` knows MLflow.
"""
