"""Using an encoder after training: load it from anywhere, embed, predict, detect, look at it, give it away.

Door: `aps.load` (`aps.inference.load`). Planning never imports this package. It knows no stage's training and no rule;
of MLflow only `serving` knows.
"""
