"""Every error that lora2fx raises on purpose: what was asked, what was found, what to do."""

from __future__ import annotations


class Lora2fxError(Exception):
    """Base class of all errors raised on purpose.

    Its message says what was asked, what was found and what to do.

    Examples:
        >>> import lora2fx
        >>> try:
        ...     lora2fx.LoRA2(r=0)
        ... except lora2fx.Lora2fxError as error:
        ...     print(type(error).__name__, error)
        MethodError r=0: pass a whole number of at least 1.
    """


class TargetError(Lora2fxError):
    """A target or exclusion that matches nothing, or that can't be read."""


class InputsError(Lora2fxError):
    """Example inputs are needed and were not given, or don't fit the model's forward."""


class RewriteError(Lora2fxError):
    """A matched weight that can't be rewritten safely."""


class VerifyError(Lora2fxError):
    """A rewritten model that doesn't compute what it must."""


class MethodError(Lora2fxError, ValueError):
    """Hyperparameters that can't work, or that don't fit a site."""


class AdapterError(Lora2fxError):
    """Adapters that are missing, present twice, or hold values that can't be used."""


class ScheduleError(Lora2fxError):
    """A pruning schedule that doesn't fit its run, was never driven, or ended early."""


class FormatError(Lora2fxError):
    """An adapter file or folder that can't be trusted or doesn't fit the model."""


class ExportError(Lora2fxError):
    """An export that can't be made or didn't prove itself; nothing was written."""


class DataError(Lora2fxError):
    """Training data that is missing, empty, or doesn't fit the task."""


class RunError(Lora2fxError):
    """A training run that can't be started, resumed, written or read."""


class Lora2fxWarning(UserWarning):
    """Something that works, but not as most users would want.

    Examples:
        >>> import warnings
        >>> import lora2fx
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", lora2fx.Lora2fxWarning)  # stop at the first
        ...     warnings.warn("rounds much of ΔW away", lora2fx.Lora2fxWarning)
        Traceback (most recent call last):
        lora2fx.errors.Lora2fxWarning: rounds much of ΔW away
    """
