"""The conformance kit: what every loss must do, whatever it computes."""

from tinkerbell_core.testing.case import NotRun, Sandboxed
from tinkerbell_core.testing.checks import CHECKS, CheckResult, check_loss, run_checks

__all__ = ["CHECKS", "CheckResult", "NotRun", "Sandboxed", "check_loss", "run_checks"]
