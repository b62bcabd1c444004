"""Load that comes as it does from many callers, and the rate up to which a service holds it."""
