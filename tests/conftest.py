"""For all tests: how fast a machine is decides nothing, least of all what hypothesis thinks of it."""

from hypothesis import HealthCheck, settings

settings.register_profile("promisefs", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("promisefs")
