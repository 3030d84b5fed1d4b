"""Reinforcement learning on verifiable and mixed rewards (paper sections 4.2.3 and 4.2.5)."""
