"""Post-training for Krea 2 (K2).

recipe -> model -> rollout -> rewards -> advantages -> loss -> checkpoint -> export
"""

__version__ = "0.1.0"
