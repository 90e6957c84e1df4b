"""Feeds: what is fed to the projector in place of the gradient, and carried to the next step."""

from ..protocols import Fed, Feed
from .error_feedback import ErrorFeedback
from .general_error_feedback import GeneralErrorFeedback
from .gradient import Gradient
from .whole_momentum import WholeMomentum

FEEDS: dict[str, Feed] = {
    "gradient": Gradient(),
    "error_feedback": ErrorFeedback(),
    "general_error_feedback": GeneralErrorFeedback(),
    "whole_momentum": WholeMomentum(),
}

__all__ = [
    "FEEDS",
    "ErrorFeedback",
    "Fed",
    "Feed",
    "GeneralErrorFeedback",
    "Gradient",
    "WholeMomentum",
]
