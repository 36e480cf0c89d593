"""Placeholder until the cluster part lands."""


def stop_requested(distributed: object) -> bool:
    return False
