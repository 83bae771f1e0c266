"""The conformance kit: checks that every loss must pass, and the code that runs them."""

from tinkerbell_core.testing.case import NotRun, Sandboxed
from tinkerbell_core.testing.checks import CHECKS, CheckResult, check_loss, run_checks

__all__ = ["CHECKS", "CheckResult", "NotRun", "Sandboxed", "check_loss", "run_checks"]
