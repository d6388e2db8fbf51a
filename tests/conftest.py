"""Of all suites: property tests are bounded by pytest's timeout alone; a busy machine may slow any one example."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")
