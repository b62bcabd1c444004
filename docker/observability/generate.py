"""Write the alerts as Kubernetes wants them, from those that Prometheus itself reads.

usage: python docker/observability/generate.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
ALERTS = HERE / "alerts.yaml"
PROMETHEUS_RULE = HERE.parent / "kubernetes" / "components" / "monitoring" / "alerts.yaml"
_HEAD = """# Written by `make generate` from docker/observability/alerts.yaml.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: captionserve
spec:
"""


def prometheus_rule() -> str:
    """The manifest whole."""
    lines = ALERTS.read_text(encoding="utf-8").splitlines()
    # Indented as they are, so that a difference reads like that of the source.
    rules = lines[lines.index("groups:") :]
    return _HEAD + "".join(f"  {line}".rstrip() + "\n" for line in rules)


def main(arguments: list[str]) -> int:
    """Write the manifest, or check that it is up to date."""
    if arguments not in ([], ["--check"]):
        sys.stderr.write(f"{__doc__}")
        return 2
    rule = prometheus_rule()
    if yaml.safe_load(rule)["spec"] != yaml.safe_load(ALERTS.read_text(encoding="utf-8")):
        sys.stderr.write("alerts.yaml has more than groups\n")
        return 1
    if not arguments:
        PROMETHEUS_RULE.write_text(rule, encoding="utf-8")
    elif not PROMETHEUS_RULE.is_file() or PROMETHEUS_RULE.read_text(encoding="utf-8") != rule:
        sys.stderr.write("the PrometheusRule is out of date; run make generate\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
