"""varfast: GRPO fine-tuning of next-scale visual autoregressive image models (VAR)."""

from varfast.policy import Policy, load_policy
from varfast.types import InputError, Rollout

__version__ = "0.1.0"
__all__ = ["InputError", "Policy", "Rollout", "__version__", "load_policy"]
