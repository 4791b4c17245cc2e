"""Load checkpoints in their original formats, or synthetic ones: `load_checkpoint(CheckpointRequest(...))`."""

from export.checkpoints.load import CheckpointRequest, load_checkpoint
from export.checkpoints.model import NETWORK_ROLES, ROLES, Checkpoint, Component, roles_for

__all__ = ["NETWORK_ROLES", "ROLES", "Checkpoint", "CheckpointRequest", "Component", "load_checkpoint", "roles_for"]
