"""How many examples are tried: the same few in the suite, many and other ones with ``make fuzz``."""

import os

from hypothesis import HealthCheck, settings

# What bounds time are the rules on sizes: no example may depend on how fast the machine is.
COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("suite", max_examples=60, derandomize=True, database=None, **COMMON)
settings.register_profile("long", max_examples=5000, database=None, print_blob=True, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))
