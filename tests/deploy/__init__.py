"""What deploys the service: manifests, compose files, alerts, dashboards, scripts.

`make lint-deploy` runs these with every tool there; without a tool its tests are skipped by name.
"""
