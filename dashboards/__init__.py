"""Grafana dashboards as code: `make dashboards` writes manifests/monitoring/dashboards/*.json from here.

One module for each dashboard (`job`, `fleet`, `carbon`), the kinds of panels they are made of in `panels`, pictures of
them in `render`.
"""
