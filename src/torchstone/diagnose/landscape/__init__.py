"""The loss landscape between and around checkpoints: lines, directions, curvature, and the plateau/decay split of tokens."""
