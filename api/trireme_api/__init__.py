"""The language all parts of Trireme share: no torch, no kopf."""
