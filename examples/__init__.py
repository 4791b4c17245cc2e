"""Programs that use moma-rt."""
