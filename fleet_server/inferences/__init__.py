"""Inference requests that devices answer together: what callers ask of a fleet, sent in parts and gathered again."""
