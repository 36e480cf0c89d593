"""The stages that train or evaluate an encoder, and what they share."""
