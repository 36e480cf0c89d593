"""Settings."""

from aps.settings.study import *  # noqa
